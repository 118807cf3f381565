"""A table of kernels: each checked against the float64 oracle, then raced against every dense rival, weights cold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zeroskip.planning.candidates import layouts
from zeroskip.planning.measure import Measured, measure_layouts, runner_name
from zeroskip.prune.patterns import Pattern

__all__ = ["FULL", "QUICK", "Case", "KernelTable", "Row", "bench_kernels"]


@dataclass(frozen=True)
class Case:
    """A weight [m, k] of random numbers, zeros chosen by magnitude under a pattern."""

    m: int
    k: int
    pattern: str
    sparsity: float

    def weight(self) -> Tensor:
        """fp32 [m, k], the same numbers each time; they and their zeros are exact in bf16."""
        generator = torch.Generator().manual_seed(self.m * 31 + self.k)
        dense = torch.randn(self.m, self.k, generator=generator).bfloat16().float()
        keep = Pattern.parse(self.pattern).select(dense.abs(), self.sparsity)
        return dense * keep


@dataclass(frozen=True)
class Row:
    """One kernel on one case at one token count.

    `ms` is None where the kernel's output failed the oracle (`problem` says how). `against_linear` and `against_dense`
    are ratios of medians: how many times faster than nn.Linear in the weight's own dtype, and than the fastest dense.
    """

    kernel: str
    layout: str
    m: int
    k: int
    pattern: str
    sparsity: float
    tokens: int
    ms: float | None
    gflops: float | None
    against_linear: float | None
    against_dense: float | None
    problem: str | None = None


@dataclass
class KernelTable:
    """What `bench_kernels` found; `str` is the table."""

    rows: list[Row] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        from zeroskip.planning.report import table

        head = ["kernel", "storage", "shape", "zeros", "tokens", "ms", "GFLOP/s", "x nn.Linear", "x best dense"]
        lines = table(head, map(_cells, self.rows))
        lines += [
            "GFLOP/s counts non-zero weights only; nn.Linear is torch's in fp32; best dense is the fastest dense row.",
            "Weights are cold, kernels interleaved, ratios are ratios of medians.",
        ]
        return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    case = [row.kernel, row.layout, f"{row.m}x{row.k}", f"{row.pattern} {row.sparsity:.0%}", str(row.tokens)]
    if row.ms is None:
        return [*case, "-", "-", "-", f"WRONG: {row.problem}"]
    return [*case, f"{row.ms:.3f}", f"{row.gflops:.1f}", f"{row.against_linear:.2f}", f"{row.against_dense:.2f}"]


def _cases(shapes: tuple[tuple[int, int], ...]) -> tuple[Case, ...]:
    kinds = (("8:16@64", 0.5), ("unstructured", 0.5), ("unstructured", 0.9))
    return tuple(Case(m, k, pattern, sparsity) for m, k in shapes for pattern, sparsity in kinds)


QUICK = (_cases(((1024, 1024),)), (1, 128))
FULL = (_cases(((1024, 1024), (1536, 384), (4096, 1024), (1024, 4096))), (1, 16, 128, 1024))


def bench_kernels(
    quick: bool = True, progress: Callable[[int, int, str], None] = lambda done, total, name: None
) -> KernelTable:
    """Race the kernels of the registry.

    Parameters
    ----------
    quick : bool
        One shape, two token counts, and of each format the kernel of the highest ISA row only.
    progress : callable
        Told (cases done, cases in all, the next case).
    """
    cases, tokens = QUICK if quick else FULL
    found = KernelTable()
    for done, case in enumerate(cases):
        progress(done, len(cases), f"{case.m}x{case.k} {case.pattern}")
        found.rows += _measure(case, tokens, quick)
    progress(len(cases), len(cases), "")
    return found


def _measure(case: Case, tokens: tuple[int, ...], quick: bool) -> Iterator[Row]:
    weight = case.weight()
    module = nn.Linear(case.k, case.m, bias=False)
    module.weight = nn.Parameter(weight, requires_grad=False)
    candidates, _ = layouts(module, weight, None, ("fp32", "bf16"), max(tokens))
    if quick:
        for layout in candidates:
            layout.kernels = layout.kernels[:1]
    measured = measure_layouts(
        candidates, weight, None, tokens=tokens, working_set_bytes=64 << 20, budget_s=0.3 if quick else 1.0
    )
    for count in tokens:
        yield from _rows(case, measured, count)


def _rows(case: Case, measured: Measured, tokens: int) -> Iterator[Row]:
    seen = measured.races[tokens]
    dense = [name for layout in measured.layouts if layout.dense for name in measured.runners(layout.label, tokens)]
    best, linear = seen.fastest(dense), runner_name(measured.layouts[0], measured.layouts[0].kernels[0])
    nonzeros = round(case.m * case.k * (1 - case.sparsity))
    for layout in measured.layouts:
        for kernel in layout.kernels:
            name = runner_name(layout, kernel)
            same = (kernel, layout.label, case.m, case.k, case.pattern, case.sparsity, tokens)
            if name in measured.wrong:
                yield Row(*same, None, None, None, None, measured.wrong[name])
                continue
            seconds = seen.median(name)
            work = 2e-9 * tokens * (case.m * case.k if layout.dense else nonzeros)
            ratios = (seen.ratio(linear, name).value, seen.ratio(best, name).value)
            yield Row(*same, seconds * 1e3, work / seconds, *ratios)
