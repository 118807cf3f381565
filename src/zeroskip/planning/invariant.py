"""Make a model that exists give each row the same bits in every batch, without measuring what is fast.

Each linear layer is tried with its own weight (rows.py). In order of preference: the layer as it is; one kernel for
every number of rows (packed layers, convolutions among them, whose rows are positions); row by row, which is always
right and loses what a batch gains. All else in a transformer - norms, activations, embeddings, the choice of a token -
works on each row by itself, but for attention, which is the caller's concern.

`zs.compile(batch_invariant=True)` needs none of it: there, steady kernels are what competes.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zeroskip import ops
from zeroskip.conv_layers import PackedConv
from zeroskip.dense_layers import DTYPES, DenseLinear, OneDnnLinear, RowLinear, by_rows
from zeroskip.embedding_layers import PackedEmbedding
from zeroskip.errors import ZeroskipError
from zeroskip.nn import PackedLinear
from zeroskip.planning.install import put_all
from zeroskip.planning.rows import UP_TO, is_invariant, pin, random_rows
from zeroskip.planning.siblings import part
from zeroskip.sites.linear import Conv1DAdapter

__all__ = ["RowByRow", "make_invariant"]


class RowByRow(nn.Module):
    """Any linear layer that sees one row at a time."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return by_rows(self.layer, x)


def make_invariant(model: nn.Module, up_to: int = UP_TO) -> dict[str, int]:
    """Make every linear layer of a model give a row the same bits in every batch, in place.

    Parameters
    ----------
    model : nn.Module
        On the CPU; packed layers get their kernel, others are wrapped.
    up_to : int
        Every number of rows up to it is tried, and some larger ones.

    Returns
    -------
    dict
        How many layers are left ``"as they are"``, have ``"one kernel"``, work ``"row by row"``.

    Raises
    ------
    ZeroskipError
        If the model has layers of another kind: stacked experts, dense convolutions, or a packed convolution of which
        no kernel holds the rows.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() > 2:
            raise ZeroskipError(f"{name} has {parameter.dim()} dimensions: batch_invariant serves linear layers only")
    part(model)
    counts: Counter[str] = Counter()
    own = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
    pairs: list[tuple[nn.Module, nn.Module]] = []
    with torch.inference_mode():
        for name, layer in list(model.named_modules()):
            if isinstance(layer, PackedEmbedding):  # each row is unpacked by itself
                continue
            if not (isinstance(layer, PackedLinear | OneDnnLinear | nn.Linear) or Conv1DAdapter.matches(layer)):
                continue
            how = _packed(name, layer, own, up_to) if isinstance(layer, PackedLinear) else _torch(layer, own, up_to)
            counts[how] += 1
            if how == "row by row" and not isinstance(layer, RowLinear):
                pairs.append((layer, RowByRow(layer)))
    put_all(model, pairs)
    return dict(counts)


def _packed(name: str, layer: PackedLinear, dtype: torch.dtype, up_to: int) -> str:
    now = partial(ops.run, layer.packed, kernel=layer.kernel)
    rows = random_rows(layer.in_features, dtype, up_to)
    if is_invariant(now, rows, up_to) and (dtype == torch.float32 or is_invariant(now, rows.float(), up_to)):
        return "as they are"
    if pin(layer, dtype, up_to=up_to):
        return "one kernel"
    if isinstance(layer, PackedConv):
        raise ZeroskipError(f"{name}: no kernel holds the rows of this packed convolution; compile it batch-invariant")
    return "row by row"


def _torch(layer: Any, dtype: torch.dtype, up_to: int) -> str:
    """What torch computes: tried in fp32; in half precision, where rounding hides the order, not to be trusted."""
    if isinstance(layer, RowLinear):
        return "row by row"
    computed = DTYPES[layer.values] if isinstance(layer, OneDnnLinear) else layer.weight.dtype
    width = layer.weight.shape[0] if Conv1DAdapter.matches(layer) else layer.in_features
    if not isinstance(layer, OneDnnLinear | DenseLinear):  # those cast, others take what they have
        dtype = computed
    if min(dtype.itemsize, computed.itemsize) >= 4 and is_invariant(layer, random_rows(width, dtype, up_to), up_to):
        return "as they are"
    return "row by row"
