"""The mode in which a row gets the same bits whatever else is in the batch.

A matrix product may add in another order when it has more rows: other kernels, other tiles. So each linear layer is
tried out, with its own weight, for every number of rows that a step may have: a row's result is compared bit for bit
with what the row gives alone. The order of the sums does not depend on the values, so what holds for random rows holds
for all. In order of preference: the layer as it is; one kernel for every number of rows (packed layers); row by row,
which is always right and loses what a batch gains. Attention works token by token (attention.py). All else in a
transformer - norms, activations, embeddings, the choice of a token - works on each row by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zeroskip import ops
from zeroskip.dense_layers import DenseLinear, OneDnnLinear
from zeroskip.errors import ZeroskipError
from zeroskip.nn import PackedLinear
from zeroskip.planning.install import put_all
from zeroskip.planning.siblings import part
from zeroskip.sites.linear import Conv1DAdapter

__all__ = ["OneKernel", "RowByRow", "make_invariant"]

LARGE = (20, 33, 64, 130, 256)  # numbers of rows as prompts have them
PLACES = (19, 27, 32, 45, 63, 90, 129, 180, 255)  # rows that are looked at there
Call = Callable[[Tensor], Tensor]


class OneKernel(nn.Module):
    """A packed layer with one kernel for every number of rows."""

    def __init__(self, layer: PackedLinear, kernel: str) -> None:
        super().__init__()
        self.layer, self.kernel = layer, kernel

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        return ops.run(layer.packed, x, layer.bias, layer.activation, self.kernel)


class RowByRow(nn.Module):
    """A layer that sees one row at a time."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 1, x.shape[-1])
        if len(rows) == 1:
            y: Tensor = self.layer(x)
            return y
        y = torch.cat([self.layer(row) for row in rows])
        return y.reshape(*x.shape[:-1], y.shape[-1])


def make_invariant(model: nn.Module, concurrency: int) -> dict[str, int]:
    """Make every linear layer of a model give a row the same bits in every batch, in place.

    Parameters
    ----------
    model : nn.Module
        On the CPU; layers are wrapped, not changed.
    concurrency : int
        Rows of a step in which every request decodes.

    Returns
    -------
    dict
        How many layers are left ``"as they are"``, have ``"one kernel"``, work ``"row by row"``.

    Raises
    ------
    ZeroskipError
        If the model has layers of another kind, such as stacked experts.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() > 2:
            raise ZeroskipError(f"{name} has {parameter.dim()} dimensions: batch_invariant serves linear layers only")
    part(model)
    counts: Counter[str] = Counter()
    own = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    pairs: list[tuple[nn.Module, nn.Module]] = []
    with torch.inference_mode():
        for layer in list(model.modules()):
            if not (isinstance(layer, PackedLinear | OneDnnLinear | DenseLinear | nn.Linear) or _is_conv1d(layer)):
                continue
            new, how = _invariant(layer, concurrency, own)
            counts[how] += 1
            pairs.append((layer, new))
    put_all(model, pairs)
    return dict(counts)


def _is_conv1d(layer: nn.Module) -> bool:
    return Conv1DAdapter.matches(layer)


def _invariant(layer: Any, concurrency: int, dtype: torch.dtype) -> tuple[nn.Module, str]:
    if isinstance(layer, nn.Linear):
        dtype, width = layer.weight.dtype, layer.in_features
    elif _is_conv1d(layer):
        dtype, width = layer.weight.dtype, layer.weight.shape[0]
    else:
        width = layer.in_features
    x = torch.randn(max(concurrency, *LARGE), width, generator=torch.Generator().manual_seed(0)).to(dtype)
    if is_invariant(layer, x, concurrency):
        return layer, "as they are"
    if isinstance(layer, PackedLinear):
        for kernel in ops.kernels(layer.packed):
            forced = OneKernel(layer, kernel)
            if not kernel.endswith("_scalar") and is_invariant(forced, x, concurrency):
                return forced, "one kernel"
    return RowByRow(layer), "row by row"


def is_invariant(call: Call, x: Tensor, concurrency: int) -> bool:
    """Return whether each row of `x` gives the same bits in every number of rows that a step may have."""
    looked_at = sorted({*range(concurrency), *PLACES})
    alone = {row: call(x[row : row + 1])[0] for row in looked_at}
    for count in (*range(2, concurrency + 1), *LARGE):
        together = call(x[:count])
        if any(not torch.equal(together[row], alone[row]) for row in looked_at if row < count):
            return False
    return True
