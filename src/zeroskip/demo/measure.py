"""Sentences per second of every rival and of ours: all checked, all on the same batches, interleaved in one race."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zeroskip.bench.timer import Race, race
from zeroskip.demo.rivals import Batch, Entry, compiled, dense_models, eager
from zeroskip.errors import ZeroskipError

__all__ = ["OURS", "Speed", "Speeds", "batches", "measure", "model_bytes", "quicker_dtype"]

log = logging.getLogger(__name__)

OURS = "ours, sparse"
COMPILED = " + torch.compile"
ALIKE = 0.98  # cosine of a token's output with the reference's; bf16 through six layers stays above .995
BUDGET_S = {1: 5.0, 64: 12.0}
BEHIND = 2.0  # a kind this much slower than the fastest, run eagerly, is timed once: it cannot be the best dense
ROWS = 8  # of a batch are enough to tell which dtype is quicker
BELIEVED_S = 0.5  # one call this long is no matter of set-up
Note = Callable[[str], None]


@dataclass(frozen=True)
class Speed:
    """One kind at one batch size: median rate, ratio to the best dense with its 98 % interval, rounds timed."""

    kind: str
    batch_size: int
    sentences_per_second: float
    ratio: float
    low: float
    high: float
    rounds: int
    is_ours: bool


@dataclass
class Speeds:
    """All that were timed; `missing` says why a kind has no time; `tokens` gives (rows, tokens) of each batch."""

    rows: list[Speed] = field(default_factory=list)
    best_dense: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, tuple[int, int]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def ours(self, batch_size: int) -> Speed:
        """The faster of our sparse model eager and compiled."""
        rows = [row for row in self.rows if row.is_ours and row.batch_size == batch_size]
        if not rows:
            raise ZeroskipError(f"the sparse model has no time at batch {batch_size}: {self.missing}")
        return max(rows, key=lambda row: row.ratio)


def batches(tokenizer: Any, texts: list[str], sizes: tuple[int, ...], max_tokens: int) -> dict[int, Batch]:
    """Make one batch of real texts for each size, padded to its longest text.

    The texts of a batch are spread over all lengths; a batch of one is a text of median length.
    """
    by_length = sorted(texts, key=len)
    made: dict[int, Batch] = {}
    for size in sizes:
        take = [by_length[(2 * i + 1) * len(by_length) // (2 * size)] for i in range(size)]
        made[size] = dict(tokenizer(take, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"))
    return made


def quicker_dtype(model: nn.Module, batch: Batch) -> str:
    """Return the dtype, "fp32" or "bf16", in which the dense fp32 model runs faster on this machine."""
    few = {name: tensor[:ROWS] for name, tensor in batch.items()}
    half = copy.deepcopy(model).to(torch.bfloat16)
    calls = {name: [_bound(eager(one), few)] for name, one in (("fp32", model), ("bf16", half))}
    return race(calls, budget_s=1.0, min_rounds=3).fastest()


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, layers prepacked by oneDNN included; a shared tensor counts once."""
    seen = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if t.nbytes}
    hidden = [getattr(module, "nbytes", 0) for module in model.modules()]
    return sum(seen.values()) + sum(each for each in hidden if isinstance(each, int))


def measure(
    dense: nn.Module,
    sparse: nn.Module,
    reference: nn.Module,
    dtype: str,
    inputs: Mapping[int, Batch],
    note: Note = lambda _: None,
    *,
    compile_models: bool = True,
    budget_s: Mapping[int, float] = BUDGET_S,
) -> Speeds:
    """Time every kind of dense model and our sparse one.

    Parameters
    ----------
    dense : nn.Module
        fp32, unpruned. Not modified.
    sparse : nn.Module
        Ours, compiled.
    reference : nn.Module
        The pruned weights in an ordinary fp32 model: what `sparse` has to agree with.
    dtype : str
        Of the activations in `sparse`.
    inputs : mapping from batch size to batch
    note : callable
        Told what is being done.
    compile_models : bool
        Whether to time every kind under torch.compile too, which takes longest.
    budget_s : mapping from batch size to seconds
        Of the race at each batch size.
    """
    speeds = Speeds(tokens={size: tuple(batch["input_ids"].shape) for size, batch in inputs.items()})  # type: ignore[misc]
    models = dict(dense_models(dense, dtype, list(inputs.values()))) | {OURS: sparse}
    truths = {size: (eager(dense)(batch), eager(reference)(batch)) for size, batch in inputs.items()}
    for size, batch in inputs.items():
        note(f"batch {size}: eager")
        entries, once = _agreeing({name: eager(model) for name, model in models.items()}, batch, truths[size], speeds)
        limit = BEHIND * min(once[name] for name in _dense(once))
        known = dict(once)
        near = [name for name in once if name == OURS or once[name] <= limit]
        for name in _to_compile(once, limit) if compile_models else ():
            note(f"batch {size}: compiling {name}")
            try:
                entry = compiled(models[name], batch)
            except Exception as error:  # inductor, dynamo and the C++ compiler raise what they like
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
                speeds.missing[f"{name}{COMPILED}, batch {size}"] = reason
                continue
            right, seconds = _agreeing({f"{name}{COMPILED}": entry}, batch, truths[size], speeds)
            entries, known = entries | right, known | seconds
        runners = {name: entry for name, entry in entries.items() if name in near or name not in once}
        note(f"batch {size}: timing {len(runners)} kinds")
        timed = race(_calls(runners, batch), budget_s=budget_s[size], min_rounds=5, core=_dense(runners), known=known)
        _record(speeds, timed, size, {name: once[name] for name in entries if name not in runners}, once)
    return speeds


def _to_compile(once: Mapping[str, float], limit: float) -> list[str]:
    """The kinds worth compiling, which is what takes longest here.

    Of torch's and of our dense kinds the faster one always, others if they are near. torch.compile with freezing
    prepacks for oneDNN by itself, so that kind is not compiled twice; our dense kernels are the same call compiled as
    eager, so the slower of them cannot overtake the faster.
    """
    chosen = [OURS] if OURS in once else []
    for kind in ("torch", "our dense"):
        found = sorted((name for name in once if name.startswith(kind)), key=lambda name: once[name])
        chosen += [name for name in found if name == found[0] or (kind == "torch" and once[name] <= limit)]
    return chosen


def _dense(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith(OURS)]


def _bound(entry: Entry, batch: Batch) -> Callable[[], object]:
    return lambda: entry(batch)


def _calls(entries: Mapping[str, Entry], batch: Batch) -> dict[str, list[Callable[[], object]]]:
    return {name: [_bound(entry, batch)] for name, entry in entries.items()}


def _agreeing(
    entries: Mapping[str, Entry], batch: Batch, truth: tuple[Tensor, Tensor], speeds: Speeds
) -> tuple[dict[str, Entry], dict[str, float]]:
    """Keep the entries whose output agrees with the reference, with the seconds of one call each.

    A wrong result gets no time.
    """
    right: dict[str, Entry] = {}
    once: dict[str, float] = {}
    mask = batch["attention_mask"].bool()
    for name, entry in entries.items():
        want = truth[name.startswith(OURS)]
        seconds, output = _timed(entry, batch)
        if seconds < BELIEVED_S:  # the first call sets things up
            seconds = min(_timed(entry, batch)[0] for _ in range(3))
        cosine = torch.nn.functional.cosine_similarity(output.float(), want, dim=-1)[mask].min().item()
        if cosine >= ALIKE:  # NaN is not
            right[name], once[name] = entry, seconds
        else:
            speeds.missing[f"{name}, batch {len(mask)}"] = f"wrong result (cosine {cosine:.3f} with the reference)"
            log.error("%s gives wrong results (cosine %.3f)", name, cosine)
    return right, once


def _timed(entry: Entry, batch: Batch) -> tuple[float, Tensor]:
    start = time.perf_counter()
    output = entry(batch)
    return time.perf_counter() - start, output


def _record(speeds: Speeds, timed: Race, size: int, behind: Mapping[str, float], once: Mapping[str, float]) -> None:
    """Write down the race, and who was too far behind for it, with a ratio over a kind that was timed both ways."""
    dense = _dense(timed.names)
    best = timed.fastest(dense)
    speeds.best_dense[size] = best
    for name in timed.names:
        ratio = timed.ratio(best, name)
        rate = size / timed.median(name)
        rounds = len(timed.samples[name])
        speeds.rows.append(Speed(name, size, rate, ratio.value, ratio.low, ratio.high, rounds, name not in dense))
    both = timed.fastest([name for name in timed.names if name in once])
    for name, seconds in behind.items():
        ratio_once = timed.ratio(best, both).value * once[both] / seconds
        rate = size / (timed.median(both) * seconds / once[both])
        ours = name.startswith(OURS)
        speeds.rows.append(Speed(name, size, rate, ratio_once, ratio_once, ratio_once, 1, ours))
