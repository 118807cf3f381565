"""Whole language models: each recipe pruned, compiled, stored and loaded again, raced against the dense model in torch.

All models are in one process and take turns in every race, on the same prompts; so each finds the caches full of the
others. Load time and memory are those of a process of its own, where no other model is.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zeroskip.bench import peers
from zeroskip.bench.llm_make import DENSE, Maker, measure_stored
from zeroskip.bench.llm_models import NEW_TOKENS, POSITIONS, SHAPES, Step, alone, generate, prompt
from zeroskip.bench.llm_products import Products, measure_products, shapes_of
from zeroskip.bench.llm_profile import profile_step
from zeroskip.bench.llm_results import Contender, LlmTable, Timing
from zeroskip.bench.llm_rivals import Rival, Rivals
from zeroskip.bench.llm_settings import DTYPES, Settings
from zeroskip.bench.llm_summary import summary
from zeroskip.bench.llm_work import Work
from zeroskip.bench.peers.remote import WorkClock
from zeroskip.bench.timer import Race, race
from zeroskip.bench.turns import Turns
from zeroskip.calibrate import strings_of, token_stream, window_limit
from zeroskip.errors import ZeroskipError
from zeroskip.io import load
from zeroskip.io.companions import TOKENIZERS
from zeroskip.planning.machine import this_machine
from zeroskip.quality import perplexity
from zeroskip.quality.perplexity import sizes, windows

__all__ = ["Settings", "bench_llm", "rivals"]

ROUNDS = 7
FAR_BEHIND = 1.3  # times the fastest rival's time: who takes longer at the shortest prompt, reads no longer one
PRODUCT_S = 2.0  # seconds of a race of products
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
        New, empty, or of an earlier run with the same models: every model is stored there, under its name.
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
        return _Bench(settings, folder, progress).run()
    finally:
        torch.set_num_threads(before)


class _Bench:
    """One run: makes the models, measures each alone, then all of them in turns."""

    def __init__(self, settings: Settings, folder: Path, progress: Progress) -> None:
        import transformers

        import zeroskip

        self.settings, self.folder, self.progress = settings, folder, progress
        races = len(settings.threads) * len(settings.tokens + settings.batch)
        self.done, self.steps = 0, 2 * (len(DTYPES) + len(settings.recipes)) + races + bool(settings.peers)
        packages = (zeroskip, torch, transformers)
        versions = {package.__name__: str(package.__version__) for package in packages}
        name = str(settings.model or f"{settings.shape}, {settings.layers or SHAPES[settings.shape].blocks} layers")
        self.found = LlmTable(name, str(this_machine()), settings.to_dict(), versions)
        self.tokenizer = None if settings.text is None and settings.calibration is None else self._tokenizer()

    def run(self) -> LlmTable:
        self._check()
        self.work = Work(self.folder, self.settings.models)
        self.maker = Maker(self.settings, self.work, self.tokenizer)
        with Rivals(self.settings.peers, self.settings.modes, self.work) as rivals:
            if self.settings.make_only:
                self._make_only(rivals)
                return self.found
            self._make()
            for one in self.found.contenders:
                self._next(f"{one.name} alone")
                if one.problem is None:
                    where = self.work.place(one.name)
                    one.footprint = alone(one.name, where, self.settings.threads[0], self.settings.tokens)
            there = [one.name for one in self.found.contenders if one.problem is None]
            models = {name: load(self.work.place(name)) for name in there}
            if self.settings.peers:
                self._next("other libraries")
                self.found.contenders += rivals.open(*self._expected(models), self.settings.threads[0])
                self.found.missing |= rivals.missing
            for threads in self.settings.threads:
                torch.set_num_threads(threads)
                if threads != self.settings.threads[0]:
                    rivals.again(threads)
                with torch.inference_mode():
                    self._races(models, rivals, threads)
            self._perplexities(models, rivals)
        if self.settings.products:
            self.found.products = self._products()
            for name in self.found.products.names:  # of these, products are what there is
                self.found.missing.pop(name, None)
        self.found.summary = summary(self.found.contenders, self.found.times)
        return self.found

    def _make_only(self, rivals: Rivals) -> None:
        """Prune, and have the files of other libraries written."""
        if self.settings.peers:
            self._next("other libraries")
            self.maker.dense("bf16")
            rivals.make()
            self.found.missing |= rivals.missing
        for recipe in self.settings.recipes:
            self._next(recipe)
            self.maker.pruned(recipe)
            gc.collect()

    def _expected(self, models: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return a prompt [1, tokens], and what the dense model says after it, [vocabulary] fp32."""
        dense = [models[name] for name in ("torch fp32", "torch bf16") if name in models]
        model = dense[0] if dense else load(self.work.place(DENSE))
        ids = prompt(model, min(self.settings.tokens), 1)
        with torch.inference_mode():
            return ids, model(ids, use_cache=False).logits[0, -1].float()

    def _races(self, models: Mapping[str, Any], rivals: Rivals, threads: int) -> None:
        shortest = min(self.settings.tokens)
        before: Race | None = None
        for count in sorted(self.settings.tokens):
            self._next(f"first token after {count}, {threads} threads")
            taking = rivals.found if before is None else leading(rivals.found, before)
            known = {} if before is None else {name: before.median(name) * count / shortest for name in before.names}
            seen = self._race("first token", models, taking, count, 1, threads, known)
            before = before or seen
        for batch in self.settings.batch:
            self._next(f"decode, batch {batch}, {threads} threads")
            self._race("decode", models, rivals.found, shortest, batch, threads, {})
        if self.settings.profile:
            for name, model in models.items():
                self.progress(self.steps, self.steps, f"profile of {name}")
                told = profile_step(name, model, prompt(model, shortest, 1), self.settings.compiled)
                self.found.profiles.append(told)

    def _products(self) -> Products:
        return measure_products(
            shapes_of(self.maker.source(torch.bfloat16)),
            self.settings.peers,
            sorted({1, *self.settings.tokens}),
            self.settings.threads,
            min(self.settings.race_s, PRODUCT_S),
            lambda what: self.progress(self.steps, self.steps, what),
        )

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

    def _check(self) -> None:
        """Find out before the work what would stop it later."""
        if self.settings.model is None:
            self._check_prompts(POSITIONS)
            return
        model: Any = load(self.settings.model)
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
        """Have every model of ours and of torch stored."""
        for name in DTYPES:
            self._next(f"torch {name}")
            if name in self.settings.dense:
                self.maker.dense(name)
                one, where = Contender(f"torch {name}", "rival", name), self.work.place(f"torch {name}")
                measure_stored(one, where, load(where))
                self.found.contenders.append(one)
            elif name == "bf16" and self.settings.peers:
                self.maker.dense(name)
        for recipe in self.settings.recipes:
            self._next(recipe)
            self.found.contenders.append(self.maker.compiled(recipe))
            gc.collect()

    def _race(
        self,
        what: str,
        models: Mapping[str, Any],
        rivals: Sequence[Rival],
        tokens: int,
        batch: int,
        threads: int,
        known: Mapping[str, float],
    ) -> Race:
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
        for rival in rivals:
            name = rival.contender.name
            runners[name], prepare[name] = [rival.runner(what, ids, clock)], turns.of(rival.process.name)
        budget: Any = {"budget_s": self.settings.race_s, "min_rounds": ROUNDS, "retire": False}
        seen = race(runners, prepare=prepare, known=known, clock=clock, **budget)
        for name in seen.names:
            median, made = seen.median(name), batch if what == "decode" else tokens
            ratios = {other: seen.ratio(other, name) for other in seen.names if other != name}
            timing = Timing(what, tokens, batch, threads, name, median * 1e3, seen.rounds, made / median, ratios)
            self.found.times.append(timing)
        return seen


def leading(rivals: Sequence[Rival], seen: Race) -> list[Rival]:
    """Return the rivals that were not far behind the fastest of them: the others need not read the longest prompts."""
    times = {rival.contender.name: seen.median(rival.contender.name) for rival in rivals}
    best = min(times.values(), default=0.0)
    return [rival for rival in rivals if times[rival.contender.name] <= FAR_BEHIND * best]


def _both(first: Callable[[], object], second: Callable[[], object]) -> None:
    first()
    second()
