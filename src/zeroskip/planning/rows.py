"""Whether a row gets the same bits whatever else is in the batch: found by trying, bit for bit.

A matrix product may add in another order when it has more rows: other kernels, other tiles. So a row's result is
compared with what the row gives alone, for every small number of rows and some large ones, in ordinary company and
beside rows of Inf and NaN. The order of the sums depends on the shape and on where the zeros are, not on the values:
what holds for random rows holds for all.

Where results are rounded to half precision nearly every order gives the same bits, so kernels of ours are tried with
fp32 activations too, which shows the sums as they are. Of torch's layers in half precision nothing can be found out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zeroskip import ops
from zeroskip.formats import Packed
from zeroskip.nn import PackedLinear
from zeroskip.planning.candidates import kernels_to_try

if TYPE_CHECKING:
    from zeroskip.planning.measure import Measured

__all__ = ["UP_TO", "is_invariant", "pin", "random_rows", "steady_kernels", "steady_layouts"]

UP_TO = 17  # every number of rows up to this one is tried
LARGE = (20, 33, 64, 130, 256)  # and some as prompts have them
PLACES = (19, 27, 32, 45, 63, 90, 129, 180, 255)  # rows that are looked at there
STRANGE = (torch.inf, torch.nan, 1e4)  # company that a row may have
Call = Callable[[Tensor], Tensor]


def random_rows(width: int, dtype: torch.dtype, up_to: int = UP_TO) -> Tensor:
    """Return rows [n, width], as many as `is_invariant` looks at, the same in every process."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(max(up_to, *LARGE), width, generator=draw).to(dtype)


def is_invariant(call: Call, x: Tensor, up_to: int = UP_TO) -> bool:
    """Return whether each row of `x` [n, k] gets the same bits from `call` in every number of rows and any company.

    Parameters
    ----------
    call : function
        From rows [t, k] to [t, m].
    x : Tensor
        As `random_rows` gives them.
    up_to : int
        Every number of rows up to it is tried, and some larger ones.
    """
    looked_at = sorted({*range(up_to), *PLACES})
    alone = {row: _bits(call(x[row : row + 1])[0]) for row in looked_at}
    for count in sorted({*range(2, up_to + 1), *LARGE}):
        together = call(x[:count])
        if any(not torch.equal(_bits(together[row]), alone[row]) for row in looked_at if row < count):
            return False
    for count in (3, LARGE[1]):
        company = x[:count].clone()
        for place, value in enumerate(STRANGE, start=1):
            company[place :: len(STRANGE) + 1] = value
        beside = call(company)
        ordinary = (row for row in looked_at if row < count and row % (len(STRANGE) + 1) == 0)
        if any(not torch.equal(_bits(beside[row]), alone[row]) for row in ordinary):
            return False
    return True


def steady_kernels(
    packed: Packed, dtype: torch.dtype, kernels: Iterable[str] | None = None, up_to: int = UP_TO
) -> tuple[str, ...]:
    """Return the kernels that give every row of a packed weight's product the same bits in every batch.

    Parameters
    ----------
    packed : Packed
        The weight; it is tried with itself.
    dtype : torch.dtype
        Of the activations.
    kernels : iterable of str, optional
        Those to try; by default all that are worth measuring here.
    up_to : int
        As for `is_invariant`.
    """
    tried = [random_rows(packed.shape[1], dtype, up_to)]
    if dtype != torch.float32:
        tried.append(tried[0].float())  # exact in the dtype as well, so that nothing but the sums is rounded
    calls = {
        name: partial(ops.run, packed, kernel=name) for name in (kernels_to_try(packed) if kernels is None else kernels)
    }
    with torch.inference_mode():
        return tuple(name for name, call in calls.items() if all(is_invariant(call, x, up_to) for x in tried))


def steady_layouts(measured: Measured, dtype: torch.dtype) -> dict[str, tuple[str, ...]]:
    """Return {layout: its steady kernels} of what was measured at a site.

    torch's own layers are never among them: its libraries choose by the shape and by the number of threads.
    """
    found = {
        layout.label: steady_kernels(layout.packed, dtype, layout.kernels)
        for layout in measured.layouts
        if layout.packed is not None
    }
    return {label: kernels for label, kernels in found.items() if kernels}


def pin(layer: PackedLinear, dtype: torch.dtype, wanted: str | None = None, up_to: int = UP_TO) -> bool:
    """Give a packed layer one kernel for every number of rows: the wanted one if it can, else the first steady one.

    Returns
    -------
    bool
        Whether there is one; the layer is as it was if not.
    """
    packed = layer.packed
    if wanted is None or wanted not in ops.kernels(packed):
        wanted = next(iter(steady_kernels(packed, dtype, up_to=up_to)), None)
    if wanted is not None:
        layer.kernel = wanted
    return wanted is not None


def _bits(row: Tensor) -> Tensor:
    return row.contiguous().view(torch.uint8)
