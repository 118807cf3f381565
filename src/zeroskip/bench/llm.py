"""Whole language models: each recipe pruned, compiled, stored and loaded again, raced against the dense model in torch.

All models are in one process and take turns in every race, on the same prompts; so each finds the caches full of the
others. Load time and memory are those of a process of its own, where no other model is.
"""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zeroskip.bench import peers
from zeroskip.bench.llm_models import (
    NEW_TOKENS,
    POSITIONS,
    SHAPES,
    Step,
    alone,
    generate,
    narrowest,
    prompt,
    random_model,
    without_data,
)
from zeroskip.bench.llm_results import Contender, LlmTable, Timing
from zeroskip.bench.timer import race
from zeroskip.calibrate import strings_of, window_limit
from zeroskip.compile import compile as compile_model
from zeroskip.errors import ZeroskipError, suggest
from zeroskip.io import load, save
from zeroskip.io.companions import TOKENIZERS, copy_companions
from zeroskip.io.save import check_new
from zeroskip.planning.machine import this_machine
from zeroskip.planning.plan import plan_of
from zeroskip.prune import Recipe, prune
from zeroskip.prune.recipe import DEFAULTS
from zeroskip.quality import perplexity
from zeroskip.quality.perplexity import sizes

__all__ = ["Settings", "bench_llm", "rivals"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WRONG = 0.1  # a compiled model whose logits differ by more of the largest one gets no time
ROUNDS = 7
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Settings:
    """What to benchmark.

    Attributes
    ----------
    model : Path or None
        A Hugging Face directory of a dense causal language model.
    shape : str
        Instead of `model`: random weights of one of `SHAPES`, with `layers` blocks where given.
    recipes : tuple of str
        Names or files of recipes.
    tokens, batch : tuple of int
        Of prompts; sequences that are decoded together.
    dtype : "fp32" or "bf16"
        What ours compute in between their layers; torch's rivals take part in both.
    text, context
        As for `zeroskip.perplexity`; without text none is measured.
    calibration : Path or None
        Text for methods that need data; without it others stand for them: `without_data`.
    race_s : float
        Seconds of each race, once it has its least number of rounds.
    peers : tuple of str
        Other libraries that are asked for.
    """

    model: Path | None = None
    shape: str = ""
    layers: int | None = None
    recipes: tuple[str, ...] = ("none", "llm-int8-50", "llm-int4-50")
    tokens: tuple[int, ...] = (128, 1024)
    batch: tuple[int, ...] = (1, 4, 16)
    threads: int = 1
    dtype: str = "fp32"
    text: Path | None = None
    context: int | None = None
    calibration: Path | None = None
    race_s: float = 5.0
    peers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.model is None) == (not self.shape):
            raise ZeroskipError("give a model directory or a shape: one of them, not both")
        if self.shape and self.shape not in SHAPES:
            raise ZeroskipError(f"unknown shape {self.shape!r}{suggest(self.shape, SHAPES)}")
        if self.model is not None and not self.model.is_dir():
            raise ZeroskipError(f"{self.model}: no such model directory")
        if self.layers is not None and (not self.shape or self.layers < 1):
            raise ZeroskipError(f"layers is {self.layers}: give 1 or more, and only with a shape")
        if self.shape and (self.text is not None or self.calibration is not None):
            raise ZeroskipError(f"{self.shape} has random weights and no tokenizer: give a model, or no text")
        if self.dtype not in DTYPES:
            raise ZeroskipError(f"unknown dtype {self.dtype!r}{suggest(self.dtype, DTYPES)}")
        names = [Path(recipe).name for recipe in self.recipes]
        if not names or len(names) > len(set(names)):
            raise ZeroskipError(f"recipes {', '.join(names) or 'are none'}: give each once, and at least one")
        for recipe in self.recipes:
            Recipe.read(DEFAULTS, recipe)
        for what, counts in {"tokens": self.tokens, "batch": self.batch, "threads": (self.threads,)}.items():
            if not counts or min(counts) < 1:
                raise ZeroskipError(f"{what} {counts}: give numbers of at least 1")
        if not 0 < self.race_s < math.inf:
            raise ZeroskipError(f"race_s is {self.race_s}: give seconds above 0")
        for name in self.peers:
            if name not in peers.names():
                raise ZeroskipError(f"unknown peer {name!r}{suggest(name, peers.names())}")

    def to_dict(self) -> dict[str, Any]:
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


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
    torch.set_num_threads(settings.threads)
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
        self.done, self.steps = 0, 2 * (len(DTYPES) + len(settings.recipes)) + len(settings.tokens + settings.batch)
        packages = (zeroskip, torch, transformers)
        versions = {package.__name__: str(package.__version__) for package in packages}
        name = str(settings.model or f"{settings.shape}, {settings.layers or SHAPES[settings.shape].blocks} layers")
        self.found = LlmTable(name, str(this_machine()), settings.to_dict(), versions)
        for peer in settings.peers:
            why = "it runs no whole models here yet; for its products alone: zeroskip bench kernels --peers"
            self.found.missing[peer] = f"{why} {peer}"
        self.tokenizer = None if settings.text is None and settings.calibration is None else self._tokenizer()

    def run(self) -> LlmTable:
        self._check()
        self._make()
        for one in self.found.contenders:
            self._next(f"{one.name} alone")
            if one.problem is None:
                where = self.folder / one.name
                one.footprint = alone(one.name, where, self.settings.threads, self.settings.tokens)
        models = {one.name: load(self.folder / one.name) for one in self.found.contenders if one.problem is None}
        with torch.inference_mode():
            for count in self.settings.tokens:
                self._next(f"first token after {count}")
                self._race("first token", models, count, 1)
            for batch in self.settings.batch:
                self._next(f"decode, batch {batch}")
                self._race("decode", models, min(self.settings.tokens), batch)
        for one in self.found.contenders:
            if self.settings.text is not None and one.name in models:
                self.progress(self.steps, self.steps, f"perplexity of {one.name}")
                told = perplexity(models[one.name], self.settings.text, self.tokenizer, context=self.settings.context)
                one.perplexity = told.to_dict()
        return self.found

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
            self._store(Contender(f"torch {name}", "rival", name), self._source(dtype))
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
        self.found.contenders.append(one)

    def _race(self, what: str, models: Mapping[str, Any], tokens: int, batch: int) -> None:
        runners: dict[str, list[Callable[[], object]]] = {}
        prepare: dict[str, Callable[[], object]] = {}
        for name, model in models.items():
            ids = prompt(model, tokens, batch)
            if what == "decode":
                step = Step(model, ids)
                runners[name], prepare[name] = [step], step.again
            else:
                runners[name] = [partial(generate, model, ids, 1)]
        seen = race(runners, prepare=prepare, budget_s=self.settings.race_s, min_rounds=ROUNDS, retire=False)
        for name in seen.names:
            median, made = seen.median(name), batch if what == "decode" else tokens
            ratios = {other: seen.ratio(other, name) for other in seen.names if other != name}
            timing = Timing(what, tokens, batch, name, median * 1e3, seen.rounds, made / median, ratios)
            self.found.times.append(timing)
