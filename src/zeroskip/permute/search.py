"""Find an order of units that lets a pattern keep more: many small exchanges, none of which loses anything.

At each step one unit is drawn from each of many cells, and for every two of them is known what their cells would keep
if they changed places. Pairs that like each other best do so, all at once: they touch different cells, so their gains
add up. It begins with the order that is there, so the result keeps at least as much.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zeroskip.permute.views import View

__all__ = ["search"]

DRAWN = 256  # cells at most in one step, which costs the square of it
SWEEPS = 24  # times that every unit is drawn, about
STEPS = 2000  # at most
GAIN = 1e-9


def search(views: Sequence[View], classes: Tensor, generator: torch.Generator) -> Tensor:
    """Return [slots] int64: which unit is to stand in each slot.

    Parameters
    ----------
    views : sequence of View
        Left in the new order.
    classes : Tensor
        [slots] int64; units change places within their class only.
    generator : torch.Generator
        On the CPU.
    """
    order = torch.arange(len(classes))
    levels = {tuple(view.cells.tolist()): view.cells for view in views}.values()
    for cells in sorted(levels, key=lambda cells: len(set(cells.tolist()))):  # the wide cells first
        number = cells.unique(return_inverse=True)[1]  # type: ignore[no-untyped-call]
        count = int(number.max()) + 1
        rounds = max(1, -(-count // DRAWN))
        idle = 0
        most = min(STEPS, SWEEPS * rounds * int(number.bincount().max()))
        for _ in range(most if count > 1 else 0):
            drawn = _drawn(number, count, generator)
            moved = _step(views, classes, drawn, order)
            idle = 0 if moved else idle + 1
            if idle > 3 * rounds * int(number.bincount().max()):
                break
    return order


def _drawn(number: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return one slot of each cell, of at most `DRAWN` cells."""
    shuffled = torch.randperm(len(number), generator=generator)
    first = torch.full((count,), len(number))
    first.scatter_reduce_(0, number[shuffled], torch.arange(len(number)), "amin")
    slots = shuffled[first]
    return slots[torch.randperm(count, generator=generator)[:DRAWN]] if count > DRAWN else slots


def _step(views: Sequence[View], classes: Tensor, drawn: Tensor, order: Tensor) -> bool:
    """Make the best of one draw; `order` and the views change in place."""
    gain = torch.zeros(len(drawn), len(drawn))
    sure = torch.zeros(len(drawn), len(drawn))  # the part that needs no second look
    allowed = classes[drawn].unsqueeze(0) == classes[drawn].unsqueeze(1)
    for view in views:
        cells = view.cells[drawn]
        same = cells.unsqueeze(0) == cells.unsqueeze(1)
        alone = same.sum(0) == 1
        allowed &= same | (alone.unsqueeze(0) & alone.unsqueeze(1))
        keeps = view.replaced(drawn)
        now = keeps.diagonal()
        more = (keeps + keeps.t() - now.unsqueeze(0) - now.unsqueeze(1)).masked_fill_(same, 0.0)
        gain += more
        if view.exact:
            sure += more
    gain.masked_fill_(~allowed, 0.0).fill_diagonal_(0.0)
    best, partner = gain.max(1)
    here = torch.arange(len(drawn))
    found = ((best > GAIN) & (partner[partner] == here) & (here < partner)).nonzero().squeeze(1)
    if len(found) == 0:
        return False
    one, other, real = drawn[found], drawn[partner[found]], sure[found, partner[found]]
    for view in views:
        if not view.exact:
            real += view.exchanged(one, other)
    one, other = one[real > GAIN], other[real > GAIN]
    if len(one) == 0:
        return False
    for view in views:
        view.swap(one, other)
    order[torch.cat([one, other])] = order[torch.cat([other, one])]
    return True
