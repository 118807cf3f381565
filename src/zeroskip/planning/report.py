"""Plans and analyses as plain text tables; sites that differ only in a number of their name share one row."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zeroskip.analyze import Analysis
    from zeroskip.compare import Comparison
    from zeroskip.planning.plan import Plan, SitePlan

__all__ = ["analysis_table", "comparison_table", "human_bytes", "plan_table", "table"]

WIDTH = 118


def plan_table(plan: Plan) -> str:
    """Return the plan as text: a table of sites, the reasons, the whole model, the notes."""
    counts = plan.tokens.counts
    header = ["site", "shape", "zeros", "chosen", *[f"x at {t}" for t in counts], "bytes", "why"]
    reasons: dict[str, int] = {}
    rows: dict[tuple[str, ...], list[str]] = {}
    for site in plan.sites:
        why = reasons.setdefault(site.reason, len(reasons) + 1)
        row = (_generic(site.name), *_cells(site, counts), f"[{why}]")
        rows.setdefault(row, []).append(site.name)
    body = [[_of(sites), *rest] for (_, *rest), sites in rows.items()]
    asked = f"tokens {_tokens(plan)}; precision {plan.precision or 'as in the model'}"
    asked += "; as few bytes as are nowhere slower" if plan.prefer == "bytes" else ""
    lines = [f"plan for {plan.machine}", asked, ""]
    if plan.batch_invariant:
        each = f"; {len(plan.rows)} layers of torch work row by row" if plan.rows else ""
        lines.insert(2, f"batch-invariant: one kernel at each site for every token count{each}")
    lines += table(header, body) if body else ["no sites"]
    lines.append("")
    lines += [_wrap(f"[{number}] {reason}", 4) for reason, number in reasons.items()]
    if plan.sites:
        before, after = plan.bytes_before, plan.bytes_after
        packed = sum(site.is_packed for site in plan.sites)
        lines.append(
            f"{packed} of {len(plan.sites)} sites packed; weights {human_bytes(before)} -> {human_bytes(after)} "
            f"({after / max(before, 1):.0%})"
        )
        if plan.fused:
            gains = [ratio for group in plan.fused for ratio in group.ratios.values()]
            lines.append(
                f"{len(plan.fused)} groups of layers that read the same tensor are computed together: "
                f"{min(gains):.2f} to {max(gains):.2f}x as fast as apart"
            )
        if plan.folded:
            functions = " and ".join(sorted({pair.function for pair in plan.folded}))
            lines.append(f"{len(plan.folded)} activations ({functions}) are computed by the layer before them")
        which = "batch-invariant dense" if plan.batch_invariant else "dense"
        lines.append(f"x at T: times as fast as the fastest {which} candidate at T tokens, measured site by site")
    lines += [_wrap(str(check), 2) for check in plan.checks]
    lines += [_wrap(f"note: {note}", 2) for note in plan.notes]
    return "\n".join(lines)


def _cells(site: SitePlan, counts: Sequence[int]) -> list[str]:
    zeros = f"{site.pattern} {site.sparsity:.0%}" if site.sparsity else "none"
    speedups = site.speedups.get(site.label, {})
    each = _ratios(speedups, counts)
    sizes = f"{human_bytes(site.bytes_before)} -> {human_bytes(site.bytes_after)}"
    return [f"{site.shape[0]}x{site.shape[1]}", zeros, site.label, *each, sizes]


def _ratios(speedups: Mapping[int, float], counts: Sequence[int]) -> list[str]:
    """The cells of one layout; a site measured at a size of its own shows it in the last."""
    cells = [f"{speedups[t]:.2f}" if t in speedups else "-" for t in counts]
    other = [f"{ratio:.2f} at {t}" for t, ratio in speedups.items() if t not in counts]
    return [*cells[:-1], *other] if other else cells


def _tokens(plan: Plan) -> str:
    if plan.tokens.weights is None:
        return ", ".join(map(str, plan.tokens.counts)) + " (each counts alike)"
    pairs = zip(plan.tokens.counts, plan.tokens.weights, strict=True)
    return ", ".join(f"{count} (weight {weight:g})" for count, weight in pairs)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table; every column is as wide as its longest cell."""
    body = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[column]) for row in body) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in body]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def human_bytes(count: int) -> str:
    """Return a size such as ``'1.2 MB'`` (powers of 1000)."""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def _generic(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)


def _of(sites: Sequence[str]) -> str:
    """The name of a row: that of its site, or what the names of several have in common."""
    return f"{_generic(sites[0])} ({len(sites)})" if len(sites) > 1 else sites[0]


def _wrap(text: str, indent: int) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)


def analysis_table(answer: Analysis) -> str:
    """Return an analysis as text: the advice, a table of sites with every layout, and the break-even points."""
    counts = answer.tokens.counts
    lines = [f"analysis on {answer.machine}", "", _wrap(answer.advice, 0), ""]
    lines += table(["site", "shape", "zeros", "layout", "bytes", *[f"x at {t}" for t in counts]], _site_rows(answer))
    lines += ["x at T: times as fast as the fastest dense layer at T tokens; * is what zs.compile would install", ""]
    rows = []
    for shape, found in answer.break_even.items():
        kinds: dict[tuple[str, str], dict[int, str]] = {}
        for one in found:
            kinds.setdefault((one.format, one.pattern), {})[one.tokens] = str(one)
        rows += [[shape, *kind, *[each.get(t, "-") for t in counts]] for kind, each in kinds.items()]
    if rows:
        lines += ["sparsity at which a format breaks even with the fastest dense layer:"]
        lines += table(["shape", "format", "zeros", *[f"at {t}" for t in counts]], rows)
    return "\n".join(lines + [_wrap(f"note: {note}", 2) for note in answer.notes])


def _site_rows(answer: Analysis) -> list[list[str]]:
    groups: dict[tuple[str, tuple[tuple[str, ...], ...]], list[str]] = {}
    for site in answer.sites:
        zeros = f"{site.pattern} {site.sparsity:.0%}" if site.sparsity else "none"
        cells: list[tuple[str, ...]] = [("x".join(map(str, site.shape)), zeros)]
        for label, speedups in site.speedups.items():
            mark = "*" if label == site.label else ""
            size = human_bytes(site.layout_bytes.get(label, 0))
            cells.append((label + mark, size, *_ratios(speedups, answer.tokens.counts)))
        groups.setdefault((_generic(site.name), tuple(cells)), []).append(site.name)
    rows: list[list[str]] = []
    for (_, (what, *each)), sites in groups.items():
        head = [_of(sites), *what]
        for cells_of_layout in each:
            rows.append([*head, *cells_of_layout])
            head = ["", "", ""]
    return rows


def comparison_table(answer: Comparison) -> str:
    """Return a comparison of recipes as text: the advice, and a line for each recipe."""
    counts = answer.tokens.counts
    header = [
        "recipe",
        "weights",
        *[f"ms at {t}" for t in counts],
        *[f"x at {t}" for t in counts],
        "perplexity",
        "layers",
    ]
    rows: list[list[str]] = []
    for one in answer.recipes:
        mark = "*" if one.recipe == answer.best else ""
        if one.problem is not None:
            rows.append([one.recipe, "-", *["-"] * (2 * len(counts) + 1), one.problem])
            continue
        score = "-" if one.perplexity is None else f"{one.perplexity:.2f}"
        times = [f"{one.ms[t]:.3g}" if t in one.ms else "-" for t in counts]
        ratios = [f"{one.gains[t]:.2f}" if t in one.gains else "-" for t in counts]
        layers = ", ".join(f"{count} {label}" for label, count in one.layouts.items())
        rows.append([one.recipe + mark, human_bytes(one.nbytes), *times, *ratios, score, layers])
    lines = [f"recipes on {answer.machine}", "", _wrap(answer.advice, 0), "", *table(header, rows)]
    lines.append(
        "ms, x at T: all linear layers one after the other, and how many times as fast as they stand, at T tokens"
    )
    if answer.about:
        lines.append(f"perplexity on {answer.about}")
    return "\n".join(lines + [_wrap(f"note: {note}", 2) for note in answer.notes])
