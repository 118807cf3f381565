"""What a pruning run did, site by site."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from zeroskip.errors import ZeroskipError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Report", "Row"]


@dataclass
class Row:
    """One site.

    Attributes
    ----------
    name : str
    shape : list of int
        (groups, out, in).
    pattern : str
    sparsity_asked, sparsity : float
        The fraction of zeros asked for, and found in the weight that was written.
    error_before, error : float or None
        ||(W - V) X||^2 / ||W X||^2 on the calibration data, after the zeros were chosen and after the solve; None where
        the method needed no Gram matrix.
    tokens : int
        How many tokens its statistics saw.
    seconds : float
        Choice and solve; the forward passes are not in it.
    notes : list of str
        What went otherwise than planned, such as a raised ridge.
    permuted : dict, optional
        Where channels were permuted: {"with": the layers that were permuted alike, "kept_before", "kept": the fraction
        of saliency that the patterns keep without and with it, mean of the matrices touched, "seconds"}.
    """

    name: str
    shape: list[int]
    pattern: str
    sparsity_asked: float
    sparsity: float
    error_before: float | None
    error: float | None
    tokens: int
    seconds: float
    notes: list[str] = field(default_factory=list)
    permuted: dict[str, Any] | None = None

    @property
    def remarks(self) -> list[str]:
        """`notes`, and a sentence on the permutation."""
        if self.permuted is None:
            return self.notes
        kept = f"{self.permuted['kept_before']:.4f} to {self.permuted['kept']:.4f}"
        others = ", ".join(self.permuted["with"])
        said = f"permuted with {others}: kept saliency {kept}, {self.permuted['seconds']:.1f} s"
        return [*self.notes, said]


@dataclass
class Report:
    """The outcome of `prune`; `str` gives a table, `to_dict` plain values for JSON, `html` a page with pictures.

    Attributes
    ----------
    recipe : dict
        What reproduces the run on the same model and data.
    rows : list of Row
    skipped : dict of str to str
        Sites left dense, with the reason.
    seconds : float
        The whole run.
    quality : dict, optional
        {"about": which text, "before", "after": `Perplexity.to_dict()`}, or {"problem": why not}.
    speed : dict, optional
        {"advice": one sentence, "gains": {tokens: ratio}, "machine": text}, of `zeroskip.analyze`.
    budget : dict, optional
        {"name", "unit", "dense", "asked", "reached"}: what a budget had to reach, and the total over all layers before
        and after, counted or predicted from what was measured. None where the recipe has the allocation.
    """

    recipe: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    quality: dict[str, Any] | None = None
    speed: dict[str, Any] | None = None
    budget: dict[str, Any] | None = None

    @property
    def sparsity(self) -> float:
        """The fraction of zeros over all pruned sites."""
        sizes = [row.shape[0] * row.shape[1] * row.shape[2] for row in self.rows]
        return sum(row.sparsity * size for row, size in zip(self.rows, sizes, strict=True)) / max(1, sum(sizes))

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and finite numbers."""
        return {"sparsity": self.sparsity, **asdict(self)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Report:
        """Read what `to_dict` wrote.

        Raises
        ------
        ZeroskipError
            If it is something else: what can be neither printed nor written again was not written by us.
        """
        try:
            rows = [Row(**row) for row in data["rows"]]
            more = {name: data.get(name) for name in ("quality", "speed", "budget")}
            report = Report(data["recipe"], rows, data["skipped"], data["seconds"], **more)
            _ = str(report), json.dumps(report.to_dict(), allow_nan=False)
        except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise ZeroskipError(f"the report is damaged: {error!r}") from error
        return report

    def html(self, path: str | os.PathLike[str], model: nn.Module | None = None) -> None:
        """Write a page that needs no other file and no network; with the pruned `model`, pictures of its zeros too.

        Raises
        ------
        ZeroskipError
            If the file cannot be written; one that was there is then as it was.
        """
        from zeroskip.report import write

        write(self, path, model)

    def __str__(self) -> str:
        head = ("site", "shape", "pattern", "asked", "zeros", "error", "after solve", "s")
        table = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(cells[column]) for cells in table) for column in range(len(head))]
        lines = [
            "  ".join(
                f"{c:<{w}}" if i in (0, 2) else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, widths, strict=True))
            ).rstrip()
            for cells in table
        ]
        lines += [f"  {row.name}: {note}" for row in self.rows for note in row.remarks]
        lines += [f"  left dense: {name} ({reason})" for name, reason in self.skipped.items()]
        total = (
            f"{self.recipe.get('method', '')}: {len(self.rows)} sites, {self.sparsity:.2%} zeros, {self.seconds:.1f} s"
        )
        return "\n".join([*lines, total, *self.findings()])

    def findings(self) -> list[str]:
        """Return a line each on the budget, perplexity and speed, as far as there is something to say."""
        lines = []
        if self.budget is not None:
            dense, asked, reached = (f"{self.budget[key]:.6g}" for key in ("dense", "asked", "reached"))
            unit = self.budget["unit"]
            lines.append(f"budget {self.budget['name']}: {reached} {unit} of {dense} dense, {asked} asked")
        if self.quality is not None:
            lines.append(f"perplexity {_change(self.quality)}")
        if self.speed is not None:
            lines.append(f"speed: {self.speed['advice']}")
        return lines


def _change(quality: dict[str, Any]) -> str:
    if "problem" in quality:
        return f"not measured: {quality['problem']}"
    before, after = (_figure(quality[when]["value"]) for when in ("before", "after"))
    return f"{before} -> {after} ({quality['about']})"


def _figure(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.2f}"


def _cells(row: Row) -> tuple[str, ...]:
    shape = "x".join(map(str, row.shape[1:] if row.shape[0] == 1 else row.shape))
    errors = ("-" if value is None else f"{value:.4f}" for value in (row.error_before, row.error))
    return (
        row.name,
        shape,
        row.pattern,
        f"{row.sparsity_asked:.2%}",
        f"{row.sparsity:.2%}",
        *errors,
        f"{row.seconds:.2f}",
    )
