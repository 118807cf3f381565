"""What the demo found: one table, one dictionary, and a verdict in plain words."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from zeroskip.demo.data import Split
from zeroskip.demo.measure import Speed, Speeds
from zeroskip.demo.task import Recall
from zeroskip.planning.machine import Machine
from zeroskip.planning.plan import Plan
from zeroskip.planning.report import human_bytes, table
from zeroskip.prune.report import Report

__all__ = ["Result", "Size"]

PAYS = 1.02  # a gain below this is not worth another model
WORSE = 0.98
KEEPS = 0.90


@dataclass(frozen=True)
class Size:
    """Bytes of one model: its weight files, its tensors in memory, and the weights of its linear layers alone."""

    model: str
    disk: int
    memory: int
    linear: int


@dataclass
class Result:
    """Everything the demo measured; `str` is the table, `to_dict` the JSON file."""

    machine: Machine
    seed: int
    method: str
    pattern: str
    dtype: str
    split: Split
    calibration_texts: int
    dense: Recall
    sparse: Recall
    sizes: list[Size]
    speeds: Speeds | None
    plan: Plan
    report: Report
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Whether sparsity paid, in plain words."""
        kept, low, high = self.sparse.kept(self.dense, 10)
        quality = f"It keeps {kept:.0%} of the dense recall@10 ({low:.0%}-{high:.0%})"
        quality += "." if kept >= KEEPS else f", less than the {KEEPS:.0%} it should."
        half, ours = self.sizes[1], self.sizes[-1]
        size = (
            f"On disk it takes {ours.disk / half.disk:.0%} of the dense bf16 model, its linear layers alone "
            f"{ours.linear / half.linear:.0%}."
        )
        packed = sum(site.is_packed and site.sparsity > 0 for site in self.plan.sites)
        speed = "Speed was not measured." if self.speeds is None else _paid(self.speeds, packed)
        return f"{speed} {quality} {size}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        kept = {f"recall_at_{k}": self.sparse.kept(self.dense, k) for k in (1, 10)}
        return {
            "verdict": self.verdict,
            "machine": self.machine.to_dict(),
            "recipe": {
                "seed": self.seed,
                "method": self.method,
                "pattern": self.pattern,
                "activations": self.dtype,
                "calibration_texts": self.calibration_texts,
                "calibration_modules": self.split.calibration_modules,
                "test_modules": self.split.test_modules,
            },
            "quality": {
                "dense": self.dense.to_dict(),
                "sparse": self.sparse.to_dict(),
                "kept": {name: {"value": v, "interval": [low, high]} for name, (v, low, high) in kept.items()},
            },
            "sizes_bytes": [asdict(size) for size in self.sizes],
            "speeds": None if self.speeds is None else asdict(self.speeds),
            "plan": self.plan.to_dict(),
            "prune": self.report.to_dict(),
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        lines = [
            f"machine: {self.machine}",
            f"sparse: {self.pattern} by {self.method} after rotation, seed {self.seed}",
            "",
        ]
        head = ["model", "disk", "memory", "linear layers", "recall@1", "recall@10"]
        quality = {"dense fp32": self.dense, "ours, sparse": self.sparse}
        lines += table(head, [_size_row(size, quality.get(size.model)) for size in self.sizes])
        lines.append("")
        if self.speeds is not None:
            lines += [*_speed_table(self.speeds), ""]
        took = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in self.seconds.items())
        queries = f"{len(self.dense.ranks)} queries among as many documents, held-out modules; 95 % intervals"
        return "\n".join([*lines, f"recall: {queries}", f"took: {took}", "", self.verdict])


def _size_row(size: Size, recall: Recall | None) -> list[str]:
    cells = [size.model, *map(human_bytes, (size.disk, size.memory, size.linear))]
    for k in (1, 10):
        cells.append("-" if recall is None else "{:.3f} ({:.3f}-{:.3f})".format(recall.at(k), *recall.interval(k)))
    return cells


def _speed_table(speeds: Speeds) -> list[str]:
    """One row a kind, one pair of columns a batch size, fastest at the largest batch first."""
    sizes = list(speeds.tokens)
    head = ["sentences a second"]
    for size in sizes:
        rows, tokens = speeds.tokens[size]
        head += [f"batch {size} ({rows}x{tokens} tokens)", "x best dense"]
    found = {(row.kind, row.batch_size): row for row in speeds.rows}
    kinds = dict.fromkeys(row.kind for row in speeds.rows)
    order = sorted(kinds, key=lambda kind: -getattr(found.get((kind, sizes[-1])), "ratio", 0.0))
    body = []
    for kind in order:
        cells = [kind]
        for size in sizes:
            row = found.get((kind, size))
            cells += ["-", "-"] if row is None else [f"{row.sentences_per_second:.1f}", _ratio(row)]
        body.append(cells)
    if any(row.rounds == 1 for row in speeds.rows):
        body.append(["(~ called once only: too far behind)", *[""] * (len(head) - 1)])
    return [*table(head, body), *(f"not timed: {kind}: {why}" for kind, why in speeds.missing.items())]


def _ratio(row: Speed) -> str:
    return f"~{row.ratio:.2f}" if row.rounds == 1 else f"{row.ratio:.2f}"


def _paid(speeds: Speeds, packed: int) -> str:
    each = {size: speeds.ours(size) for size in speeds.tokens}
    told = ", ".join(
        f"{row.ratio:.2f}x ({row.low:.2f}-{row.high:.2f}) at batch {size} against {speeds.best_dense[size]}"
        for size, row in each.items()
    )
    if not packed:
        return f"Sparsity did not pay here: no layer gets faster by its zeros, so all stay dense ({told})."
    ratios = [row.ratio for row in each.values()]
    if min(ratios) >= WORSE and max(ratios) >= PAYS:
        return f"Sparsity paid here: {told}."
    if min(ratios) >= WORSE:
        return f"Sparsity neither paid nor cost speed here: {told}. Take it for the size, or do not bother."
    return f"Sparsity did not pay here: {told}. On this machine run the dense model."
