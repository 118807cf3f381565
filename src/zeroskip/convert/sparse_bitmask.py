"""sparse-bitmask of compressed-tensors: the non-zeros in a row, and a bit for every weight.

    P.shape        I64 [dims]
    P.compressed   [nnz] the non-zeros in row-major order
    P.bitmask      U8 [rows, ceil(columns / 8)], the first column in the lowest bit
    P.row_offsets  I64 [rows], how many non-zeros the rows before hold

Up to release 0.8.1 P is a tensor ("layer.weight"), and every tensor is stored so, norms and embeddings too; later P is
a module ("layer"), the tensor its weight. Releases from 0.15 on do not have it.

Source: the compressed-tensors library, releases 0.8 to 0.14.0.1, read for the names and the order of the bits.
"""

from __future__ import annotations

from functools import partial
from math import prod

import torch
from torch import Tensor

from zeroskip.convert.base import Format, Parts, Stored, later, shape_in
from zeroskip.convert.bits import pack_bits, put_values, unpack_bits
from zeroskip.io.container import Later

__all__ = ["SparseBitmask", "prefix_of", "tensor_of", "weights"]


class SparseBitmask(Format):
    name = "sparse-bitmask"
    writes = True

    def read(self, stored: Stored) -> int:
        old = any(name.endswith(".weight.row_offsets") for name in stored.tensors)
        count = 0
        for prefix, parts in stored.families("row_offsets", ("shape", "compressed", "bitmask")):
            shape = shape_in(stored, f"{prefix}.shape", parts["shape"])
            rows, columns = prod(shape[:-1]), shape[-1]
            bitmask, values = parts["bitmask"], parts["compressed"]
            if bitmask.dtype != torch.uint8 or bitmask.shape != (*shape[:-1], -(-columns // 8)):
                is_now = f"{bitmask.dtype} {list(bitmask.shape)}"
                raise stored.bad(f"{prefix}.bitmask", f"{is_now} cannot be the bits of a weight {list(shape)}")
            if prod(parts["row_offsets"].shape) != rows or len(values.shape) != 1:
                raise stored.bad(f"{prefix}.row_offsets", f"is not one offset for each of {rows} rows")
            name = tensor_of(prefix, old)
            stored.put(name, later(values, shape, partial(_dense, stored, prefix, parts, shape)), f"{prefix}.bitmask")
            stored.sparse.add(name)
            count += 1
        return count

    def write(self, stored: Stored, old_names: bool) -> list[str]:
        names = list(stored.tensors) if old_names else weights(stored)
        done: list[str] = []
        for name in names:
            weight = stored.tensors[name]
            if not weight.shape:
                continue
            nnz = int(torch.count_nonzero(_words(weight.make())))
            rows, columns = prod(weight.shape[:-1]), weight.shape[-1]
            stride = -(-columns // 8)
            if not old_names and nnz * weight.dtype.itemsize + rows * (stride + 8) >= weight.nbytes:
                continue  # it would grow
            prefix = prefix_of(name, old_names)
            make = partial(_encoded, stored.take(name))
            shape = torch.tensor(weight.shape)
            parts = {
                "shape": Later(torch.int64, tuple(shape.shape), partial(torch.clone, shape)),
                "compressed": later(weight, (nnz,), partial(make, "compressed")),
                "bitmask": Later(torch.uint8, (*weight.shape[:-1], stride), partial(make, "bitmask")),
                "row_offsets": Later(torch.int64, tuple(weight.shape[:-1]), partial(make, "row_offsets")),
            }
            for part, value in parts.items():
                stored.put(f"{prefix}.{part}", value, name)
            done.append(name.removesuffix(".weight"))
        return done


def _dense(stored: Stored, prefix: str, parts: Parts, shape: tuple[int, ...]) -> Tensor:
    columns = shape[-1]
    bits = unpack_bits(parts["bitmask"].make().view(-1, -(-columns // 8)))
    if bool(bits[:, columns:].any()):
        raise stored.bad(f"{prefix}.bitmask", f"has a bit beyond its {columns} columns")
    bits = bits[:, :columns]
    counts = bits.sum(1)
    values = parts["compressed"].make()
    if int(counts.sum()) != values.numel():
        raise stored.bad(f"{prefix}.compressed", f"{values.numel()} values where the mask has {int(counts.sum())} bits")
    if not torch.equal(parts["row_offsets"].make().reshape(-1).long(), counts.cumsum(0) - counts):
        raise stored.bad(f"{prefix}.row_offsets", "does not follow from the mask")
    return put_values(bits, values).view(shape)


def _encoded(weight: Later, part: str) -> Tensor:
    dense = weight.make().contiguous()
    mask = _words(dense).view(-1, dense.shape[-1]) != 0
    if part == "compressed":
        return dense.view(mask.shape)[mask]
    if part == "bitmask":
        return pack_bits(mask).view(*dense.shape[:-1], -1)
    counts = mask.sum(1)
    return (counts.cumsum(0) - counts).view(dense.shape[:-1])


def _words(weight: Tensor) -> Tensor:
    """The weight in a type that can be compared with zero."""
    return weight.float() if weight.dtype.itemsize == 1 and weight.is_floating_point() else weight


def tensor_of(prefix: str, old: bool) -> str:
    """Return the name of the tensor that `prefix` stands for."""
    return prefix if old or prefix.endswith((".weight", ".bias")) else f"{prefix}.weight"


def prefix_of(name: str, old: bool) -> str:
    return name if old else name.removesuffix(".weight")


def weights(stored: Stored) -> list[str]:
    """Return the names of the tensors that could be weights of linear layers."""
    return [
        name
        for name, tensor in stored.tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and tensor.dtype.is_floating_point
    ]
