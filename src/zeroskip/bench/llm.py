"""Whole language models: each recipe pruned, compiled, stored and loaded again, raced against the dense model in torch.

All models are in one process and take turns in every race, on the same prompts; so each finds the caches full of the
others. Load time and memory are those of a process of its own, where no other model is.
"""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zeroskip.bench import peers
from zeroskip.bench.llm_models import (
    NEW_TOKENS,
    POSITIONS,
    SHAPES,
    Step,
    alone,
    generate,
    held_bytes,
    narrowest,
    prompt,
    random_model,
    without_data,
)
from zeroskip.bench.llm_profile import profile_step
from zeroskip.bench.llm_results import Contender, LlmTable, Timing
from zeroskip.bench.llm_rivals import Rivals
from zeroskip.bench.llm_settings import DTYPES, Settings
from zeroskip.bench.peers.remote import WorkClock
from zeroskip.bench.timer import race
from zeroskip.bench.turns import Turns
from zeroskip.calibrate import strings_of, token_stream, window_limit
from zeroskip.compile import compile as compile_model
from zeroskip.errors import ZeroskipError
from zeroskip.io import load, save
from zeroskip.io.companions import TOKENIZERS, copy_companions
from zeroskip.io.save import check_new
from zeroskip.planning.machine import this_machine
from zeroskip.planning.plan import plan_of
from zeroskip.prune import Recipe, prune
from zeroskip.prune.recipe import DEFAULTS
from zeroskip.quality import perplexity
from zeroskip.quality.perplexity import sizes, windows

__all__ = ["Settings", "bench_llm", "rivals"]

WRONG = 0.1  # a compiled model whose logits differ by more of the largest one gets no time
ROUNDS = 7
Progress = Callable[[int, int, str], None]


def rivals() -> list[str]:
    """Return the peers that have low-bit weights, as language models on a CPU are run with."""
    return [name for name in peers.names() if any(mode.bits <= 8 for mode in peers.get(name).modes)]


def bench_llm(settings: Settings, folder: Path, progress: Progress = lambda done, total, name: None) -> LlmTable:
    """Run the benchmark.

    Parameters
    ----------
    settings : Settings
    folder : Path
        New or empty: every model is stored there, under its name.
    progress : callable
        Told (steps done, steps in all, what comes next).

    Raises
    ------
    ZeroskipError
        For a model that is not causal or not dense, has fewer positions than a prompt needs, or cannot be pruned; for
        a text that cannot be read or has no tokenizer.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads[0])
    try:
        return _Bench(settings, check_new(folder), progress).run()
    finally:
        torch.set_num_threads(before)


class _Bench:
    """One run: makes the models, measures each alone, then all of them in turns."""

    def __init__(self, settings: Settings, folder: Path, progress: Progress) -> None:
        import transformers

        import zeroskip

        self.settings, self.folder, self.progress = settings, folder, progress
        self.dtype = DTYPES[settings.dtype]
        races = len(settings.threads) * len(settings.tokens + settings.batch)
        self.done, self.steps = 0, 2 * (len(DTYPES) + len(settings.recipes)) + races + bool(settings.peers)
        packages = (zeroskip, torch, transformers)
        versions = {package.__name__: str(package.__version__) for package in packages}
        name = str(settings.model or f"{settings.shape}, {settings.layers or SHAPES[settings.shape].blocks} layers")
        self.found = LlmTable(name, str(this_machine()), settings.to_dict(), versions)
        self.tokenizer = None if settings.text is None and settings.calibration is None else self._tokenizer()

    def run(self) -> LlmTable:
        self._check()
        self._make()
        for one in self.found.contenders:
            self._next(f"{one.name} alone")
            if one.problem is None:
                where = self.folder / one.name
                one.footprint = alone(one.name, where, self.settings.threads[0], self.settings.tokens)
        models = {one.name: load(self.folder / one.name) for one in self.found.contenders if one.problem is None}
        source = self.folder / "torch bf16"
        with Rivals(self.settings.peers, self.settings.modes, source, self.folder) as rivals:
            if self.settings.peers:
                self._next("other libraries")
                self.found.contenders += rivals.make(*self._expected(models), self.settings.threads[0])
                self.found.missing |= rivals.missing
            for threads in self.settings.threads:
                torch.set_num_threads(threads)
                if threads != self.settings.threads[0]:
                    rivals.again(threads)
                with torch.inference_mode():
                    self._races(models, rivals, threads)
            self._perplexities(models, rivals)
        return self.found

    def _expected(self, models: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return a prompt [1, tokens], and what the dense model says after it, [vocabulary] fp32."""
        dense = [models[name] for name in ("torch fp32", "torch bf16") if name in models]
        model = dense[0] if dense else load(self.folder / "torch bf16")
        ids = prompt(model, min(self.settings.tokens), 1)
        with torch.inference_mode():
            return ids, model(ids, use_cache=False).logits[0, -1].float()

    def _races(self, models: Mapping[str, Any], rivals: Rivals, threads: int) -> None:
        shortest = min(self.settings.tokens)
        for count in self.settings.tokens:
            self._next(f"first token after {count}, {threads} threads")
            self._race("first token", models, rivals, count, 1, threads)
        for batch in self.settings.batch:
            self._next(f"decode, batch {batch}, {threads} threads")
            self._race("decode", models, rivals, shortest, batch, threads)
        if self.settings.profile:
            for name, model in models.items():
                self.progress(self.steps, self.steps, f"profile of {name}")
                told = profile_step(name, model, prompt(model, shortest, 1), self.settings.compiled)
                self.found.profiles.append(told)

    def _perplexities(self, models: Mapping[str, Any], rivals: Rivals) -> None:
        text = self.settings.text
        if text is None:
            return
        context = 0
        for one in self.found.contenders:
            if one.name in models:
                self.progress(self.steps, self.steps, f"perplexity of {one.name}")
                told = perplexity(models[one.name], text, self.tokenizer, context=self.settings.context)
                one.perplexity, context = told.to_dict(), told.context
        for rival in rivals.found:
            self.progress(self.steps, self.steps, f"perplexity of {rival.contender.name}")
            stream = token_stream(strings_of(text), self.tokenizer)
            rival.contender.perplexity = rival.perplexity(windows(stream, context, context))

    def _next(self, what: str) -> None:
        self.progress(self.done, self.steps, what)
        self.done += 1

    def _tokenizer(self) -> Any:
        given = self.settings.model
        if given is None or not any(found for pattern in TOKENIZERS for found in given.glob(pattern)):
            raise ZeroskipError(f"{given}: has no tokenizer: copy its files (tokenizer.json and the like) there")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(given)

    def _source(self, dtype: torch.dtype) -> Any:
        """Return the dense model, fresh."""
        given = self.settings.model
        model: Any = random_model(self.settings.shape, self.settings.layers) if given is None else load(given)
        return model.to(dtype).eval()

    def _check(self) -> None:
        """Find out before the work what would stop it later."""
        if self.settings.model is None:
            self._check_prompts(POSITIONS)
            return
        model = self._source(torch.float32)
        config = getattr(model, "config", None)
        if config is None or not model.can_generate() or getattr(config, "is_encoder_decoder", False):
            raise ZeroskipError(f"{self.found.model}: a {type(model).__name__} is no causal language model")
        if getattr(config, "quantization_config", None) is not None:
            raise ZeroskipError(f"{self.found.model}: is compiled or quantised: give the dense model")
        self._check_prompts(getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf)
        if self.settings.text is not None:
            sizes(self.settings.context, None, window_limit(model, self.tokenizer))
            strings_of(self.settings.text)

    def _check_prompts(self, known: float) -> None:
        longest = max(self.settings.tokens)
        if longest + NEW_TOKENS > known:
            more = f"{longest} and {NEW_TOKENS} more to decode"
            raise ZeroskipError(f"tokens {longest}: the model knows {known:.0f} positions, too few for {more}")

    def _make(self) -> None:
        for name, dtype in DTYPES.items():
            self._next(f"torch {name}")
            one = Contender(f"torch {name}", "rival", name)
            if name in self.settings.dense:
                self._store(one, self._source(dtype))
            elif name == "bf16" and self.settings.peers:
                save(self._source(dtype), self.folder / one.name)  # what theirs are made of
        for recipe in self.settings.recipes:
            self._next(recipe)
            one, model = Contender(Path(recipe).name, "ours", self.settings.dtype), self._source(self.dtype)
            one.steps = self._prune(model, recipe)
            self._compile(one, model)
            self._store(one, model)
            del model
            gc.collect()

    def _prune(self, model: nn.Module, recipe: str) -> list[dict[str, Any]]:
        if self.settings.calibration is None and Recipe.read(DEFAULTS, recipe).needs_data:
            return [prune(model, recipe=step).recipe for step in without_data(recipe, model)]
        text = self.settings.calibration
        return [prune(model, recipe=recipe, text=text, tokenizer=self.tokenizer if text else None).recipe]

    def _compile(self, one: Contender, model: Any) -> None:
        ids = prompt(model, min(self.settings.tokens), 1)
        with torch.inference_mode():
            pruned = model(ids).logits.float()
        compile_model(model, sorted({*self.settings.batch, *self.settings.tokens}), narrowest(one.steps))
        with torch.inference_mode():
            off = float((model(ids).logits.float() - pruned).abs().max() / pruned.abs().max())
        one.logits_error = off if math.isfinite(off) else None
        if not off <= WRONG:
            one.problem = f"compiled, its logits are off by {off:.2g} of the largest"
        plan = plan_of(model)
        one.layers = dict(Counter(site.label for site in plan.sites))
        one.outcome = ", ".join(check.outcome for check in plan.checks)

    def _store(self, one: Contender, model: nn.Module) -> None:
        where = self.folder / one.name
        save(model, where)
        if self.settings.model is not None:
            copy_companions(self.settings.model, where)
        one.disk_bytes = sum(file.stat().st_size for file in where.glob("*.safetensors"))
        one.memory_bytes = held_bytes(model)
        self.found.contenders.append(one)

    def _race(
        self, what: str, models: Mapping[str, Any], rivals: Rivals, tokens: int, batch: int, threads: int
    ) -> None:
        runners: dict[str, list[Callable[[], object]]] = {}
        prepare: dict[str, Callable[[], object]] = {}
        turns, clock, ids = Turns(), WorkClock(), torch.zeros(0)
        for name, model in models.items():
            ids = prompt(model, tokens, batch)
            settle = turns.of("")
            if what == "decode":
                step = Step(model, ids)
                runners[name], prepare[name] = [step], partial(_both, step.again, settle)
            else:
                runners[name], prepare[name] = [partial(generate, model, ids, 1)], settle
        for rival in rivals.found:
            name = rival.contender.name
            runners[name], prepare[name] = [rival.runner(what, ids, clock)], turns.of(rival.process.name)
        seen = race(
            runners, prepare=prepare, budget_s=self.settings.race_s, min_rounds=ROUNDS, retire=False, clock=clock
        )
        for name in seen.names:
            median, made = seen.median(name), batch if what == "decode" else tokens
            ratios = {other: seen.ratio(other, name) for other in seen.names if other != name}
            timing = Timing(what, tokens, batch, threads, name, median * 1e3, seen.rounds, made / median, ratios)
            self.found.times.append(timing)


def _both(first: Callable[[], object], second: Callable[[], object]) -> None:
    first()
    second()
