"""The models of a benchmark of language models: dense, pruned and compiled, each stored in the benchmark's folder."""

from __future__ import annotations

import gc
import math
from collections import Counter
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zeroskip.bench.llm_models import held_bytes, prompt, random_model, without_data
from zeroskip.bench.llm_results import Contender
from zeroskip.bench.llm_settings import DTYPES, Settings
from zeroskip.bench.llm_work import Work
from zeroskip.compile import compile as compile_model
from zeroskip.io import load, save
from zeroskip.io.companions import copy_companions
from zeroskip.planning.machine import this_machine
from zeroskip.planning.plan import plan_of
from zeroskip.prune import Recipe, prune

__all__ = ["DENSE", "Maker"]

WRONG = 0.1  # a compiled model whose logits differ by more of the largest one gets no time
DENSE = "torch bf16"  # what random models are made as, and other libraries' files are made of


class Maker:
    """Makes what is not there.

    Parameters
    ----------
    settings : Settings
    work : Work
    tokenizer : transformers tokenizer or None
        For recipes that calibrate.
    """

    def __init__(self, settings: Settings, work: Work, tokenizer: Any) -> None:
        self.settings, self.work, self.tokenizer = settings, work, tokenizer

    def source(self, dtype: torch.dtype) -> Any:
        """Return the dense model, fresh. A random one has bf16 weights in every dtype, as its rivals' files have."""
        given = self.settings.model
        if given is None:
            given = self.work.place(DENSE)
            if not given.exists():
                save(random_model(self.settings.shape, self.settings.layers).bfloat16(), given)
        model: Any = load(given)
        return model.to(dtype).eval()

    def dense(self, dtype: str) -> None:
        """Have the dense model stored."""
        where, model = self.work.place(f"torch {dtype}"), self.source(DTYPES[dtype])
        if not where.exists():  # a random model is stored there as soon as it is made
            self._store(model, where)

    def pruned(self, recipe: str) -> tuple[Any, list[dict[str, Any]]]:
        """Return a model that a recipe was applied to, and the recipes as applied one after the other.

        It is in the dtype of the source, as `zeroskip prune` stores it.
        """
        place, asked = f"{Path(recipe).name} pruned", Recipe.read(self.settings.arguments, recipe).values
        steps: list[dict[str, Any]] | None = self.work.model(place, asked)
        if steps is None:
            model = self.source(DTYPES[self.settings.dtype])
            steps = self._prune(model, recipe)
            stored: Any = load(self.settings.model or self.work.place(DENSE))
            self._store(model.to(stored.dtype), self.work.cleared(place))
            self.work.add_model(place, asked, steps)
            del model, stored
            gc.collect()
        return load(self.work.place(place)), steps

    def compiled(self, recipe: str) -> Contender:
        """Prune, compile and store, unless that was done on this machine; return who that is, not yet measured."""
        # A longer prompt is left out: it takes the kernels of the shortest, and would take a minute to try.
        counts = sorted({*self.settings.batch, min(self.settings.tokens)})
        asked = {
            "pruned": Recipe.read(self.settings.arguments, recipe).values,
            "counts": counts,
            "prefer": self.settings.prefer,
            "machine": this_machine().to_dict(),
            "version": version("zeroskip"),
        }
        name = Path(recipe).name
        told = self.work.model(name, asked)
        if told is not None:
            return Contender(**told)
        one = self._compile(name, recipe, counts)
        self.work.add_model(name, asked, asdict(one))
        return one

    def _compile(self, name: str, recipe: str, counts: list[int]) -> Contender:
        model, steps = self.pruned(recipe)
        rounded = any(part.get("values") for step in steps for part in (step, *step.get("rules", ())))
        # Integers are offered without being asked; weights that are exact in bf16 lose nothing there.
        precision = "bf16" if model.dtype == torch.bfloat16 and not rounded else None
        model = model.to(DTYPES[self.settings.dtype]).eval()
        one = Contender(name, "ours", self.settings.dtype, steps)
        ids = prompt(model, min(self.settings.tokens), 1)
        with torch.inference_mode():
            pruned = model(ids).logits.float()
        compile_model(model, counts, precision, prefer=self.settings.prefer)
        with torch.inference_mode():
            off = float((model(ids).logits.float() - pruned).abs().max() / pruned.abs().max())
        one.logits_error = off if math.isfinite(off) else None
        if not off <= WRONG:
            one.problem = f"compiled, its logits are off by {off:.2g} of the largest"
        plan = plan_of(model)
        one.layers = dict(Counter(site.label for site in plan.sites))
        one.outcome = ", ".join(check.outcome for check in plan.checks)
        where = self.work.cleared(name)
        self._store(model, where)
        measure_stored(one, where, model)
        return one

    def _prune(self, model: nn.Module, recipe: str) -> list[dict[str, Any]]:
        given, text = self.settings.replaced, self.settings.calibration
        if text is None and Recipe.read(self.settings.arguments, recipe).needs_data:
            steps = without_data(recipe, model, self.settings.arguments)
            return [prune(model, recipe=step).recipe for step in steps]
        return [prune(model, recipe=recipe, text=text, tokenizer=self.tokenizer if text else None, **given).recipe]

    def _store(self, model: nn.Module, where: Path) -> None:
        save(model, where)
        if self.settings.model is not None:
            copy_companions(self.settings.model, where)


def measure_stored(one: Contender, where: Path, model: nn.Module) -> None:
    """Write down what a stored model takes."""
    one.disk_bytes = sum(file.stat().st_size for file in where.glob("*.safetensors"))
    one.memory_bytes = held_bytes(model)
