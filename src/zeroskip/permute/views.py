"""What a matrix keeps of its saliency under a pattern, as a function of which unit stands in which slot.

A view knows the saliencies S [vectors, positions] of one matrix, with the units along the positions, and which of them
share a cell: M columns of N:M, V rows of a strip, the side of a block. It answers for many pairs (i, j) at once what
the cell of slot i would keep if the unit of slot j stood there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zeroskip.prune.patterns import NM, Block, Pattern

__all__ = ["Kept", "Summed", "View", "views_of"]


class View:
    """One matrix and one way in which its units share cells.

    Attributes
    ----------
    where : Tensor
        [slots] the position of each slot.
    size : int
        Positions of a cell.
    scale : float
        1 / all of the matrix's saliency.
    exact : bool
        Whether `replaced` is.
    """

    exact = True

    def __init__(self, saliency: Tensor, where: Tensor, size: int, scale: float) -> None:
        self.saliency, self.where, self.size, self.scale = saliency, where, size, scale
        self.cells = where // size

    def kept(self) -> float:
        """Return the fraction of saliency that the pattern keeps."""
        raise NotImplementedError

    def replaced(self, slots: Tensor) -> Tensor:
        """Return [n, n]: what the cell of slot i keeps with the unit of slot j in i's place, for the n slots given."""
        raise NotImplementedError

    def exchanged(self, one: Tensor, other: Tensor) -> Tensor:
        """Return [n]: what is gained if the units of these pairs of slots change places; exactly, each pair alone."""
        raise NotImplementedError

    def swap(self, one: Tensor, other: Tensor) -> None:
        """Let the units of these slots change places."""
        a, b = self.where[one], self.where[other]
        self.saliency[:, torch.cat([a, b])] = self.saliency[:, torch.cat([b, a])]

    def _members(self, slots: Tensor) -> Tensor:
        """Return [n, size - 1]: the positions that share a cell with each slot."""
        at = self.where[slots]
        first = at // self.size * self.size
        others = torch.arange(self.size - 1).expand(len(slots), -1)
        return first.unsqueeze(1) + others + (others >= (at - first).unsqueeze(1)).long()


class Kept(View):
    """Columns of N:M: every vector keeps the largest N of each cell."""

    def __init__(self, saliency: Tensor, where: Tensor, size: int, scale: float, kept: int) -> None:
        super().__init__(saliency, where, size, scale)
        self.n = kept

    def kept(self) -> float:
        cells = self.saliency.view(len(self.saliency), -1, self.size)
        return self.scale * float(cells.topk(self.n, dim=2).values.sum(dtype=torch.float64))

    def replaced(self, slots: Tensor) -> Tensor:
        top = self.saliency[:, self._members(slots)].topk(self.n, dim=2).values  # [vectors, n, N]
        sure, least = top[..., :-1].sum((0, 2)), top[..., -1]
        mine = self.saliency[:, self.where[slots]]
        out = sure.unsqueeze(1).repeat(1, len(slots))
        step = max(1, (1 << 22) // len(slots) ** 2)
        for at in range(0, len(mine), step):
            out += torch.maximum(least[at : at + step, :, None], mine[at : at + step, None, :]).sum(0)
        return out * self.scale


class Summed(View):
    """Rows of a strip, or a side of blocks: the vectors of a cell are added up, and of the sums some stay.

    With N:M@V the largest N of every M sums stay; with blocks, those above the limit where the pattern cuts at first.
    `replaced` counts what is above the limit that stands now, which is quick and never too little; `exchanged` is
    exact.
    """

    exact = False

    def __init__(
        self, saliency: Tensor, where: Tensor, size: int, scale: float, nm: tuple[int, int] | None, sparsity: float
    ) -> None:
        super().__init__(saliency, where, size, scale)
        self.nm, self.sparsity = nm, sparsity
        rest = -saliency.shape[1] % size  # the last strip may be short
        padded = torch.nn.functional.pad(saliency, (0, rest))
        self.sums = padded.view(len(padded), -1, size).sum(2).t().contiguous()  # [cells, vectors]
        drop = round(self.sums.numel() * sparsity)
        self.cut = float(self.sums.flatten().kthvalue(drop).values) if drop else 0.0
        self.limits = self._limits(self.sums)

    def _limits(self, sums: Tensor) -> Tensor:
        """Return for every sum [n, vectors] where it would have to stand to stay."""
        if self.nm is None:
            return torch.full_like(sums, self.cut)
        kept, of = self.nm
        top = sums.reshape(len(sums), sums.shape[1] // of, of).topk(kept + 1, dim=2).values[..., -2:]
        return top.mean(2, keepdim=True).expand(-1, -1, of).reshape(sums.shape)

    def _stays(self, sums: Tensor) -> Tensor:
        """Return [n]: what stays of sums [n, vectors]."""
        if self.nm is None:
            return (sums - self.cut).clamp_min(0).sum(1)
        kept, of = self.nm
        return sums.reshape(len(sums), sums.shape[1] // of, of).topk(kept, dim=2).values.sum((1, 2))

    def kept(self) -> float:
        if self.nm is not None:
            return self.scale * float(self._stays(self.sums).sum(dtype=torch.float64))
        drop = round(self.sums.numel() * self.sparsity)
        return self.scale * float(self.sums.flatten().sort().values[drop:].sum(dtype=torch.float64))

    def replaced(self, slots: Tensor) -> Tensor:
        mine = self.saliency[:, self.where[slots]].t()  # [n, vectors]
        rest = self.sums[self.cells[slots]] - mine - self.limits[self.cells[slots]]
        out = torch.empty(len(slots), len(slots))
        step = max(1, (1 << 22) // mine.numel())
        for at in range(0, len(slots), step):
            out[at : at + step] = (rest[at : at + step, None, :] + mine[None]).clamp_min_(0).sum(2)
        return out * self.scale

    def exchanged(self, one: Tensor, other: Tensor) -> Tensor:
        move = (self.saliency[:, self.where[other]] - self.saliency[:, self.where[one]]).t()
        here, there = self.sums[self.cells[one]], self.sums[self.cells[other]]
        new = self._stays(here + move) + self._stays(there - move)
        gain = (new - self._stays(here) - self._stays(there)) * self.scale
        return gain.masked_fill(self.cells[one] == self.cells[other], 0.0)

    def swap(self, one: Tensor, other: Tensor) -> None:
        move = (self.saliency[:, self.where[other]] - self.saliency[:, self.where[one]]).t()
        self.sums.index_add_(0, self.cells[one], move)
        self.sums.index_add_(0, self.cells[other], move, alpha=-1)
        touched = torch.cat([self.cells[one], self.cells[other]])
        self.limits[touched] = self._limits(self.sums[touched])
        super().swap(one, other)


def views_of(
    saliency: Tensor, pattern: Pattern, sparsity: float, rows: Tensor | None, columns: Tensor | None
) -> list[View]:
    """Return the views of one matrix.

    Parameters
    ----------
    saliency : Tensor
        [out, in] fp32, on the CPU.
    rows : Tensor or None
        [units] where the units stand among its rows.
    columns : Tensor or None
        [units, copies] where they stand among its columns.
    """
    scale = 1 / max(float(saliency.sum(dtype=torch.float64)), 1e-30)
    copies = [] if columns is None else list(columns.t())
    if isinstance(pattern, NM):
        strips = _strips(saliency, pattern.strip)
        views: list[View] = [Kept(strips.clone(), at.clone(), pattern.of, scale, pattern.kept) for at in copies]
        if rows is not None and pattern.strip > 1:
            views.append(Summed(saliency.t().clone(), rows, pattern.strip, scale, (pattern.kept, pattern.of), 0.0))
        return views
    if isinstance(pattern, Block):
        views = []
        if pattern.width > 1:
            sums = _strips(saliency, pattern.height)
            views += [Summed(sums.clone(), at.clone(), pattern.width, scale, None, sparsity) for at in copies]
        if rows is not None and pattern.height > 1:
            sums = _strips(saliency.t(), pattern.width)
            views.append(Summed(sums.clone(), rows, pattern.height, scale, None, sparsity))
        return views
    return []


def _strips(saliency: Tensor, height: int) -> Tensor:
    """Add up every `height` rows."""
    which = torch.arange(len(saliency)) // height
    return saliency.new_zeros(int(which[-1]) + 1, saliency.shape[1]).index_add_(0, which, saliency)
