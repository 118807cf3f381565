"""Whether the compiled model stays: the whole model against its dense self, and the way back."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from zeroskip.bench.timer import Race, Ratio
from zeroskip.planning.folding import find_foldable, fold
from zeroskip.planning.install import put_all, thaw
from zeroskip.planning.machine import available_memory_bytes
from zeroskip.planning.plan import Folded, Fused, ModelCheck
from zeroskip.planning.siblings import fuse
from zeroskip.planning.whole import Call, evaluating, interleaved, model_calls, ratio_by_control, with_control

__all__ = ["Verdict"]

log = logging.getLogger(__name__)

SLOWER = 0.98  # below this a model is put back
BUDGET_S = 2.0  # seconds at each token count
KEEP_BOTH = 0.25  # of the free memory: dense layers that need no more are kept until the verdict


class Verdict:
    """Follows a model through compilation and decides whether it stays compiled.

    `before` is called while the model is dense, `installed` for each layer that is about to be replaced, `after` when
    all are; `put_back` undoes everything at any time. `called` is the model, or what torch.compile made of it: it is
    what runs, so that both sides are eager or both compiled.
    """

    def __init__(self, model: nn.Module, called: nn.Module, counts: tuple[int, ...], example_inputs: Any) -> None:
        self.model, self.counts = model, counts
        self.mode = "eager" if called is model and model._compiled_call_impl is None else "compiled"
        with evaluating(model):
            self.calls: dict[int, Call] | str = model_calls(model, called, counts, example_inputs)
        self.swaps: dict[str, tuple[nn.Module | None, nn.Module]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.keeps_both = True
        self.dense_races: dict[int, Race] = {}

    def before(self, dense_bytes: int) -> None:
        """Decide whether both versions fit into memory; time the dense one now if they do not."""
        self.keeps_both = dense_bytes <= KEEP_BOTH * available_memory_bytes()
        if not self.keeps_both and not isinstance(self.calls, str):
            with evaluating(self.model):
                self.dense_races = with_control(self.calls, BUDGET_S)

    def installed(self, name: str, old: nn.Module, new: nn.Module) -> None:
        """Remember that `new` takes the place of `old`."""
        if old is new:
            return
        weight = getattr(old, "weight", None)
        if isinstance(weight, torch.Tensor):
            self.dtypes[name] = weight.dtype
        self.swaps[name] = (old if self.keeps_both else None, new)

    def withdraw(self, name: str) -> bool:
        """Put one layer back, and say whether there was one to put back."""
        old, new = self.swaps.pop(name, (None, None))
        if new is None:
            return False
        if old is None:
            thaw(self.model, self.dtypes, only={name})
        else:
            put_all(self.model, [(new, old)])
        return True

    def fused(self) -> tuple[list[Folded], list[Fused]]:
        """Fuse what belongs together, and return it: activations with the layer before them, layers of one input.

        Not for a model under torch.compile, which computes all layers apart.
        """
        if isinstance(self.calls, str) or self.mode == "compiled" or not self.swaps:
            return [], []
        with evaluating(self.model):
            if self._failure(self.calls) is not None:  # `after` will say so
                return [], []
            call = min(self.calls.items())[1]
            folded: list[Folded] = []
            for pair in find_foldable(self.model, call):
                for swap in fold(self.model, [pair]):
                    self.installed(*swap)
                    folded.append(pair)
            return folded, fuse(self.model, call, self.counts)

    def after(self, keep: bool = False) -> ModelCheck:
        """Compare, and put the model back if it is slower; with `keep` only if it does not run."""
        if not self.swaps:
            return ModelCheck(self.mode, "kept", "nothing was replaced: the model is its dense self")
        if isinstance(self.calls, str):
            return ModelCheck(self.mode, "skipped", self.calls)
        with evaluating(self.model):
            problem = self._failure(self.calls)
            if problem is not None:
                log.warning("the model does not run with packed layers, it is put back: %s", problem)
                self.put_back()
                return ModelCheck(self.mode, "put back", f"does not run with packed layers: {problem}")
            ratios = self._ratios(self.calls, BUDGET_S)
            doubtful = {t: self.calls[t] for t, ratio in ratios.items() if ratio.value < SLOWER <= ratio.high}
            if doubtful and self.keeps_both:
                ratios.update(self._ratios(doubtful, 3 * BUDGET_S))
        slower = not keep and any(ratio.value < SLOWER for ratio in ratios.values())
        if slower:
            self.put_back()
        method = "interleaved" if self.keeps_both else "one after the other, each against the same control"
        found = {t: (ratio.value, ratio.low, ratio.high) for t, ratio in ratios.items()}
        return ModelCheck(self.mode, "put back" if slower else "kept", method, found)

    def _failure(self, calls: dict[int, Call]) -> str | None:
        """Return why the compiled model does not run; some models read the weights of their layers themselves."""
        try:
            for call in calls.values():
                call()
        except Exception as error:  # whatever it is, the dense model ran
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]
        return None

    def put_back(self) -> None:
        """Restore the dense layers: those that were kept, else read again or unpacked."""
        if self.keeps_both:
            self._dense()
        else:
            thaw(self.model, self.dtypes, only=set(self.swaps))

    def _ratios(self, calls: dict[int, Call], budget_s: float) -> dict[int, Ratio]:
        if self.keeps_both:
            return interleaved(calls, self._dense, self._compiled, budget_s)
        after = with_control(calls, budget_s)
        return {t: ratio_by_control(self.dense_races[t], after[t]) for t in calls}

    def _dense(self) -> None:
        put_all(self.model, [(new, old) for old, new in self.swaps.values() if old is not None])

    def _compiled(self) -> None:
        put_all(self.model, [(old, new) for old, new in self.swaps.values() if old is not None])
