"""An embedding whose table stays integers: each token's row is unpacked when it is asked for."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from zeroskip import _core
from zeroskip.errors import ZeroskipError
from zeroskip.formats import Packed
from zeroskip.formats import blob as blobs
from zeroskip.formats.blob import Header
from zeroskip.formats.dense import PANEL
from zeroskip.native import TYPES, is_plain, threads
from zeroskip.nn import PackedLinear
from zeroskip.quantize import LEAST, SCALES

__all__ = ["PackedEmbedding", "table_problem"]


class PackedEmbedding(PackedLinear):
    """A table [vocabulary, width] whose `weight` is a blob in the format `dense` with integers, int8 [nbytes].

    Rows come out as code * scale in the dtype of `like`, an empty buffer that the casts of a model take along.

    Parameters
    ----------
    in_features, out_features
        Width and vocabulary.
    nbytes
        Length of the blob.
    """

    like: Tensor

    def __init__(self, in_features: int, out_features: int, nbytes: int) -> None:
        super().__init__(in_features, out_features, nbytes)
        self.values, self.group_size, self.scale_type = "int8", 64, "fp16"
        self.places: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, packed: Packed, dtype: torch.dtype) -> PackedEmbedding:
        """Wrap a packed table, shared, not copied; rows come out in `dtype`."""
        m, k = packed.shape
        module = cls(k, m, 0)
        module.weight = nn.Parameter(packed.blob, requires_grad=False)
        module.settle(dtype)
        return module

    def settle(self, dtype: torch.dtype) -> None:
        """Look up where things lie in the blob, once it is there.

        Raises
        ------
        ZeroskipError
            If it is no table of integers.
        """
        blob = self.weight.detach()
        header = Header.of(blob)
        if header.format != "dense" or header.values not in LEAST:
            raise ZeroskipError(f"a table is stored as dense integers, not as {header.format} {header.values}")
        self.values, self.group_size, self.scale_type = header.values, header.group_size, header.scales
        start = blob.view(torch.uint8).data_ptr()
        parts = blobs.sections(blob)
        self.places = tuple((part.data_ptr() - start, part.numel()) for part in parts)
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        blob, like = cast(Tensor, self._parameters["weight"]), cast(Tensor, self._buffers["like"])
        kind = TYPES.get(like.dtype)
        if kind is None or ids.dtype is not torch.int64 or not is_plain(ids) or blob.data_ptr() % 64:
            return self._unpacked(ids)
        ids = ids.contiguous()
        y = like.new_empty((*ids.shape, self.in_features))
        try:
            _core.lookup(blob.data_ptr(), blob.numel(), ids.data_ptr(), ids.numel(), y.data_ptr(), kind, threads())
        except ValueError as error:
            raise ZeroskipError(str(error)) from None
        return y

    def _unpacked(self, ids: Tensor) -> Tensor:
        """Do the same in calls of torch, for what traces or watches."""
        rows = ids.reshape(-1)
        if not torch.compiler.is_compiling() and rows.numel():
            low, high = int(rows.min()), int(rows.max())
            if low < 0 or high >= self.out_features:
                raise IndexError(f"token {low if low < 0 else high} is not in a table of {self.out_features}")
        panel, lane = rows // PANEL, rows % PANEL
        panels = -(-self.out_features // PANEL)
        raw = self.weight.view(torch.uint8)
        codes, scales = (raw[at : at + size] for at, size in self.places)
        quads = codes.view(panels, -1, PANEL, 4)[panel, :, lane]  # [rows, quads, 4]
        if self.values == "int4":
            quads = torch.stack([quads & 15, quads >> 4], 2)
        steps = scales.view(SCALES[self.scale_type]).view(panels, -1, PANEL)[panel, :, lane].float()
        found = (quads.flatten(1).float() + LEAST[self.values]).view(len(rows), steps.shape[1], self.group_size)
        table = (found * steps.unsqueeze(2)).flatten(1)[:, : self.in_features]
        return table.to(self.like.dtype).reshape(*ids.shape, self.in_features)

    def dense(self, weight: Tensor) -> nn.Embedding:
        """Return the embedding of torch with this weight [vocabulary, width]; it keeps the scales of its codes."""
        table = nn.Embedding(self.out_features, self.in_features, _weight=weight, _freeze=True)
        scales = self.packed.scales
        table.__dict__["zeroskip_scales"] = None if scales is None else scales.unsqueeze(0)
        return table

    def extra_repr(self) -> str:
        return f"{self.out_features}, {self.in_features}, {self.values} in groups of {self.group_size}"


def table_problem(module: nn.Module) -> str | None:
    """Return why an embedding cannot be packed, None if it can."""
    if type(module) is not nn.Embedding:
        return f"{type(module).__name__} may compute in a way of its own"
    if module.max_norm is not None:
        return "it changes its weights as it runs (max_norm)"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has hooks, which another module would not call"
    return None
