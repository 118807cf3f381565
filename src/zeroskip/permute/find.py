"""Which channels of a block may change places: found by experiment, without knowing the architecture.

A producer's output row and a consumer's input column belong together where the column depends on that row alone, as in
up_proj -> activation -> down_proj, or v_proj -> attention -> o_proj. To find the rows that n columns depend on, the
outputs with bit b of their index set are disturbed, and in another run the others: a column that one of the two moves
and the other does not has bit b of its one source. Columns that both move mix channels.

Two channels may change places if everything between treats them alike. That is seen by letting all channels of the
producers carry one random signal: columns that then agree are of one class, such as one attention head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from zeroskip.permute.probe import Probe

__all__ = ["Ends", "Exchange", "find_exchanges"]

NOISE = 1e-5  # of the largest change: below it nothing has changed
ALIKE = 1e-4  # of the largest value: columns that differ less are of one class
CLASSES = 512  # more of them, and every channel is treated in its own way


@dataclass(frozen=True, eq=False)
class Ends:
    """Rows [units] of a producer, or columns [units, copies] of a consumer, in the order of the units."""

    site: str
    at: Tensor


@dataclass(frozen=True, eq=False)
class Exchange:
    """Units that may change places with others of their class.

    Attributes
    ----------
    rows : tuple of Ends
        Of producers.
    columns : tuple of Ends
        Of consumers.
    classes : Tensor
        [units] int64.
    """

    rows: tuple[Ends, ...]
    columns: tuple[Ends, ...]
    classes: Tensor


@dataclass(frozen=True, eq=False)
class _Source:
    """A range of a producer's rows, and for each column of a consumer the row in it that the column hangs on, or -1."""

    site: str
    start: int
    size: int
    of: Tensor


def find_exchanges(probe: Probe, generator: torch.Generator) -> list[Exchange]:
    """Return the exchanges that experiments suggest; the caller has yet to try them (`zeroskip.permute.block`)."""
    plain = probe.run({})
    sources: dict[str, list[_Source]] = {}
    widths = {x.shape[-1] for x in plain.values()}
    for name, site in probe.sites.items():
        rows = site.shape[1]
        ranges = [[(0, rows)], *([(at, width) for at in range(0, rows, width)] for width in _parts(rows, widths))]
        for parts in ranges:
            found = [hit for start, size in parts for hit in _sources(probe, plain, name, start, size, generator)]
            for consumer, source in found:
                sources.setdefault(consumer, []).append(source)
            if found:
                break
    found_by: dict[tuple[tuple[str, int], ...], list[Exchange]] = {}
    for consumer, theirs in sources.items():
        exchange = _exchange(consumer, theirs, _classes(probe, consumer, theirs, generator))
        if exchange is not None:
            found_by.setdefault(tuple((each.site, each.start) for each in theirs), []).append(exchange)
    merged = [one for alike in found_by.values() if (one := _merged(alike)) is not None]
    taken = [ends.site + str(sorted(ends.at.tolist())[0]) for one in merged for ends in one.rows]
    return [one for one in merged if all(taken.count(e.site + str(sorted(e.at.tolist())[0])) == 1 for e in one.rows)]


def _parts(rows: int, widths: set[int]) -> list[int]:
    """Sizes of equal parts that a producer's rows may fall into, such as a gate and what it lets through."""
    return sorted(
        (width for width in widths if width < rows and rows % width == 0 and rows // width <= 3), reverse=True
    )


def _sources(
    probe: Probe, plain: dict[str, Tensor], name: str, start: int, size: int, generator: torch.Generator
) -> list[tuple[str, _Source]]:
    """Return (consumer, source) for all layers whose columns hang on single rows in [start, start + size)."""
    if size < 2:
        return []
    index = torch.arange(size)
    half = torch.randperm(size, generator=generator) < size // 2
    moved = _moved(probe, plain, name, start + index[half], generator)
    wanted = [each for each, which in moved.items() if each != name and 0 < int(which.sum()) < 0.95 * len(which)]
    source = {each: torch.zeros(plain[each].shape[-1], dtype=torch.int64) for each in wanted}
    known = {each: torch.ones(plain[each].shape[-1], dtype=torch.bool) for each in wanted}
    for bit in range((size - 1).bit_length()):
        on = (index >> bit) % 2 == 1
        one, other = (_moved(probe, plain, name, start + index[which], generator) for which in (on, ~on))
        wanted = [each for each in wanted if not bool((one[each] & other[each]).any())]
        for each in wanted:
            source[each] |= one[each].long() << bit
            known[each] &= one[each] | other[each]
        if not wanted:
            break
    found = []
    for each in wanted:
        of = torch.where(known[each] & (source[each] < size), source[each] + start, -1)
        if int((of >= 0).sum()) > 1:
            found.append((each, _Source(name, start, size, of)))
    return found


def _moved(
    probe: Probe, plain: dict[str, Tensor], name: str, rows: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return for every layer which of its columns change, [in] bool, when these outputs of a layer are disturbed."""

    def disturb(output: Tensor) -> Tensor:
        output = output.clone()
        noise = torch.randn((*output.shape[:-1], len(rows)), generator=generator).to(output)
        output[..., rows] += noise * (2 * output.std() + 1e-3)
        return output

    out = {}
    for each, x in probe.run({name: disturb}).items():
        change = (x - plain[each]).abs().amax(0).cpu() if x.shape == plain[each].shape else torch.ones(x.shape[-1])
        out[each] = change > NOISE * max(float(change.max()), 1e-30)
    return out


def _classes(probe: Probe, consumer: str, sources: list[_Source], generator: torch.Generator) -> Tensor:
    """Return [in] int64: columns of a consumer that agree when each producer's channels all carry one signal."""

    def carry(parts: list[_Source]) -> Callable[[Tensor], Tensor]:
        def change(output: Tensor) -> Tensor:
            output = output.clone()
            for part in parts:
                signal = torch.randn((*output.shape[:-1], 1), generator=generator).to(output)
                output[..., part.start : part.start + part.size] = signal
            return output

        return change

    by_site: dict[str, list[_Source]] = {}
    for source in sources:
        by_site.setdefault(source.site, []).append(source)
    x = probe.run({site: carry(parts) for site, parts in by_site.items()})[consumer].cpu()
    classes = torch.full((x.shape[-1],), -1)
    limit = ALIKE * float(x.abs().max())
    for number in range(CLASSES):
        rest = (classes < 0).nonzero().squeeze(1)
        if len(rest) == 0:
            return classes
        same = (x[:, rest] - x[:, rest[:1]]).abs().amax(0) <= limit
        classes[rest[same]] = number
    return torch.arange(x.shape[-1])


def _exchange(consumer: str, sources: list[_Source], classes: Tensor) -> Exchange | None:
    """Put columns that hang on the same rows together as units."""
    keys = torch.stack([source.of for source in sources], 1)
    columns = (keys >= 0).all(1).nonzero().squeeze(1)
    if len(columns) < 2:
        return None
    units, unit, count = keys[columns].unique(dim=0, return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    copies = int(count.mode().values)
    order = unit.argsort(stable=True)
    order = order[(count == copies)[unit[order]]]
    at = columns[order].view(-1, copies)
    units = units[count == copies]
    if any(len(part.unique()) < len(part) for part in units.t()):
        return None  # a row that two units share cannot move
    kinds = classes[at].unique(dim=0, return_inverse=True)[1]  # type: ignore[no-untyped-call]
    if int(kinds.bincount().max()) < 2:
        return None
    rows = tuple(Ends(source.site, part.clone()) for source, part in zip(sources, units.t(), strict=True))
    return Exchange(rows, (Ends(consumer, at),), kinds)


def _merged(alike: list[Exchange]) -> Exchange | None:
    """Join exchanges that have the same producers: their consumers are permuted together, or not at all."""
    first = alike[0]
    for other in alike[1:]:
        if any(not torch.equal(a.at, b.at) for a, b in zip(first.rows, other.rows, strict=True)):
            return None
    kinds = torch.stack([each.classes for each in alike], 1).unique(dim=0, return_inverse=True)[1]  # type: ignore[no-untyped-call]
    return Exchange(first.rows, tuple(ends for each in alike for ends in each.columns), kinds)
