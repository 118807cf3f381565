"""A benchmark of kernels as text for the terminal, and as Markdown for docs/performance.md."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby

from zeroskip.bench import peers
from zeroskip.bench.break_even import BEST, Against, break_evens
from zeroskip.bench.contest import BITS
from zeroskip.bench.results import KernelTable, Row, Spread
from zeroskip.errors import ZeroskipError
from zeroskip.planning.report import table

__all__ = ["insert", "markdown", "text"]

LEGEND = (
    "ms: median time of one product; GFLOP/s: on the non-zeros, and as if dense",
    "% peak: of the multiply-adds measured in registers (of the non-zeros where zeros are skipped)",
    "% read: stored bytes by that time, of the read bandwidth measured from memory; small layers may stay in caches",
    "x: how many times faster; median of the ratios of each round, in parentheses the middle half of them",
    "best dense: the fastest dense layout, torch's or ours, whose values are as wide or wider",
)
WIDE = 1.2
SUMMARY = (
    "each number is the geometric mean over the cases, in parentheses the lowest; with a ~ where the middle half of "
    f"the rounds spans more than {WIDE - 1:.0%}, so that another run may give another number"
)
EVEN = "Break-even: the share of zeros from which on a sparse layout is as fast, in parentheses what was measured"
COLUMNS = ("linear fp32", "linear bf16", BEST)
OWN = "own dense"
CLOSEST = (
    f"`{OWN}` is our dense layout of the same values; of another library it is the fastest "
    "of its modes whose weights are as wide or wider"
)


def text(found: KernelTable) -> str:
    """Return the table as plain text."""
    lines = [f"{found.suite} on {found.machine}", *_limits(found), ""]
    for title, rows in _groups(found.rows):
        lines += [title, *table(_head(), _cells(rows)), ""]
    if crossed := break_evens(found.rows):
        lines += [EVEN, *table(*_even(crossed)), ""]
    return "\n".join([*lines, *LEGEND, *_absent(found)])


def markdown(found: KernelTable, details: bool = False) -> str:
    """Return the benchmark as Markdown.

    A summary of our layouts over all cases with the same zeros; with `details` a table of every case after it.
    """
    lines = [f"### {found.suite}", "", f"{found.machine}.", "", *(f"- {line}" for line in _limits(found)), ""]
    lines += [*_markdown_table(*_summary(found)), "", f"Times as fast as each column: {SUMMARY}. {CLOSEST}.", ""]
    if crossed := break_evens(found.rows):
        lines += [f"{EVEN}:", "", *_markdown_table(*_even(crossed)), ""]
    if details:
        for title, rows in _groups(found.rows):
            lines += [f"**{title}**", "", *_markdown_table(_head(), _cells(rows)), ""]
    return "\n".join([*lines, *(f"- {line}" for line in (*LEGEND, *_absent(found)))])


def insert(page: str, found: KernelTable, details: bool = False) -> str:
    """Return the page with the benchmark between ``<!-- SUITE begin -->`` and ``<!-- SUITE end -->``.

    Raises
    ------
    ZeroskipError
        Where the page has no such marks.
    """
    begin, end = (f"<!-- {found.suite} {mark} -->" for mark in ("begin", "end"))
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ZeroskipError(f"the page has no place for {found.suite}: put {begin} and {end} into it")
    return f"{before}{begin}\n{markdown(found, details)}\n{end}{after}"


def _groups(rows: Iterable[Row]) -> Iterator[tuple[str, list[Row]]]:
    for (case, tokens, threads), group in groupby(rows, lambda row: (row.case, row.tokens, row.threads)):
        yield f"{case}, {_count(tokens, 'token')}, {_count(threads, 'thread')}", list(group)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def _limits(found: KernelTable) -> list[str]:
    return [str(one) for one in found.rooflines]


def _absent(found: KernelTable) -> list[str]:
    lines = [f"peer {name}: {told}" for name, told in found.peers.items() if name not in found.missing]
    lines += [f"peer {name} did not take part: {found.peers[name]}" for name in found.missing]
    wrong = sorted({f"{row.layout}: {row.problem}" for row in found.rows if row.problem})
    lines += [f"without a time: {line}" for line in wrong]
    if found.left_out:
        lines.append(f"no time was left for {_count(len(found.left_out), 'case')}: {'; '.join(found.left_out)}")
    return lines


def _head() -> list[str]:
    versus = [f"x {name}" for name in (*COLUMNS, "best peer")]
    return ["layout", "kernel", "MB", "ms", "GFLOP/s", "dense", "% peak", "% read", *versus]


def _cells(rows: list[Row]) -> Iterator[list[str]]:
    peers = [row.layout for row in rows if row.role == "peer"]
    for row in rows:
        head = [row.layout, row.kernel, f"{row.nbytes / 1e6:.2f}"]
        if row.ms is None:
            yield [*head, "none", *["-"] * 7, row.problem or ""]
            continue
        closest = min((p for p in peers if p in row.faster_than), key=lambda p: row.faster_than[p].value, default="")
        numbers = (row.gflops, row.dense_gflops, row.peak_percent, row.bandwidth_percent)
        versus = [_times(row.faster_than.get(name)) for name in (*COLUMNS, closest)]
        yield [*head, f"{row.ms:.3f}", *map(_number, numbers), *versus[:-1], f"{versus[-1]} {closest}".strip()]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _times(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.value:.2f} ({spread.low:.2f}-{spread.high:.2f})"


def _summary(found: KernelTable) -> tuple[list[str], list[list[str]]]:
    """One line for each of our layouts, zeros, token and thread count; a column for each rival and peer."""
    groups: dict[tuple[str, str, int, int], list[Row]] = defaultdict(list)
    for row in found.rows:
        if row.role == "ours" and row.ms is not None:
            # Dense layouts compute the same whatever the zeros.
            zeros = "any" if row.dense else f"{row.pattern} {row.sparsity:.0%}"
            groups[row.layout, zeros, row.tokens, row.threads].append(row)
    seen = {column for rows in groups.values() for row in rows for column in _closest(row)}
    first = [name for name in (*COLUMNS, OWN) if name in seen]
    versus = [*first, *sorted(seen.difference(first))]
    header = ["layout", "zeros", "tokens", "threads", "cases", "% peak", "% read", *versus]
    body = []
    for (layout, zeros, tokens, threads), rows in sorted(groups.items()):
        closest = [_closest(row) for row in rows]
        ratios = [[each[name] for each in closest if name in each] for name in versus]
        percents = [[row.peak_percent or 0.0 for row in rows], [row.bandwidth_percent or 0.0 for row in rows]]
        numbers = [f"{math.fsum(values) / len(values):.0f}" for values in percents]
        body.append([layout, zeros, str(tokens), str(threads), str(len(rows)), *numbers, *map(_mean, ratios)])
    return header, body


def _closest(row: Row) -> dict[str, Spread]:
    """How many times faster the row is than each column of the summary: of a library's modes, than the fastest."""
    found: dict[str, Spread] = {}
    for name, spread in row.faster_than.items():
        column = _column(row, name)
        if column is not None and (column not in found or spread.value < found[column].value):
            found[column] = spread
    return found


def _column(row: Row, name: str) -> str | None:
    """The column that a rival of this row belongs to, None where it has narrower weights or is another of ours."""
    if name in COLUMNS:
        return name
    library, _, mode = name.partition(" ")
    if library == "dense":
        return OWN if mode == row.values else None
    modes = {one.name: one.bits for one in peers.get(library).modes} if library in peers.names() else BITS
    return library if modes.get(mode, 0) >= BITS[row.values] else None


def _even(crossed: list[Against]) -> tuple[list[str], list[list[str]]]:
    """One line for each sparse layout, token and thread count."""
    cells: dict[tuple[str, str, int, int], dict[str, str]] = defaultdict(dict)
    for one in crossed:
        key = (f"{one.found.format} {one.found.values}", one.found.pattern, one.found.tokens, one.threads)
        name = BEST if one.rival == BEST else "own"
        cells[key] |= {"shapes": str(one.shapes), name: str(one)}
    header = ["layout", "zeros", "tokens", "threads", "shapes", "our dense layout of the same values", BEST]
    body = [[*map(str, key), one["shapes"], one.get("own", "-"), one.get(BEST, "-")] for key, one in cells.items()]
    return header, body


def _mean(ratios: list[Spread]) -> str:
    if not ratios:
        return "-"
    value, low, high = (
        math.exp(math.fsum(map(math.log, each)) / len(ratios))
        for each in zip(*((one.value, one.low, one.high) for one in ratios), strict=True)
    )
    return f"{'~' * (high > WIDE * low)}{value:.2f} ({min(one.value for one in ratios):.2f})"


def _markdown_table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [header, *rows]]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]
