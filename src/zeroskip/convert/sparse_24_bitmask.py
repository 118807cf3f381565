"""sparse-24-bitmask of compressed-tensors: two weights of every four, and a bit for every weight.

    P.shape       I64 [2, 1]
    P.compressed  [out, in / 2] the two weights of each four, in order; one that is kept may be zero
    P.bitmask     U8 [out, ceil(in / 8)], the first column in the lowest bit, two bits set of each four

The names go as in sparse-bitmask. The values may be int8 or fp8, with scales stored as another format says.

Source: the compressed-tensors library, releases 0.8 to 0.14.0.1. It keeps the two largest of any four and loses the
rest without a word; ours refuses a weight that is not 2:4.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from zeroskip.convert.base import Format, Parts, Stored, later, shape_in
from zeroskip.convert.bits import pack_bits, put_values, unpack_bits
from zeroskip.convert.sparse_bitmask import prefix_of, tensor_of, weights
from zeroskip.errors import ZeroskipError
from zeroskip.io.container import Later

__all__ = ["Sparse24Bitmask"]


class Sparse24Bitmask(Format):
    name = "sparse-24-bitmask"
    writes = True

    def read(self, stored: Stored) -> int:
        old = any(name.endswith(".weight.bitmask") for name in stored.tensors)
        count = 0
        for prefix, parts in stored.families("bitmask", ("shape", "compressed")):
            shape = shape_in(stored, f"{prefix}.shape", parts["shape"], 2)
            rows, columns = shape
            for part, dtype, expected in (
                ("bitmask", torch.uint8, (rows, -(-columns // 8))),
                ("compressed", parts["compressed"].dtype, (rows, columns // 2)),
            ):
                has = parts[part]
                if has.dtype != dtype or has.shape != expected or columns % 4:
                    is_now = f"{has.dtype} {list(has.shape)}"
                    raise stored.bad(f"{prefix}.{part}", f"{is_now} cannot be of a 2:4 weight {list(shape)}")
            name = tensor_of(prefix, old)
            make = partial(_dense, stored, prefix, parts, columns)
            stored.put(name, later(parts["compressed"], shape, make), f"{prefix}.bitmask")
            stored.sparse.add(name)
            count += 1
        return count

    def write(self, stored: Stored, old_names: bool) -> list[str]:
        done: list[str] = []
        for name in weights(stored):
            weight = stored.tensors[name]
            rows, columns = weight.shape
            if columns % 4 or not _is_24(weight.make()):
                continue
            prefix = prefix_of(name, old_names)
            make = partial(_encoded, stored.take(name))
            shape = torch.tensor([[rows], [columns]])
            parts = {
                "shape": Later(torch.int64, (2, 1), partial(torch.clone, shape)),
                "compressed": later(weight, (rows, columns // 2), partial(make, "compressed")),
                "bitmask": Later(torch.uint8, (rows, -(-columns // 8)), partial(make, "bitmask")),
            }
            for part, value in parts.items():
                stored.put(f"{prefix}.{part}", value, name)
            done.append(name.removesuffix(".weight"))
        if not done:
            raise ZeroskipError(f"{stored.path}: no weight is 2:4 in every group of four inputs; use sparse-bitmask")
        return done


def _is_24(weight: Tensor) -> bool:
    return bool(((weight.float() != 0).view(-1, 4).sum(1) <= 2).all())


def _dense(stored: Stored, prefix: str, parts: Parts, columns: int) -> Tensor:
    bits = unpack_bits(parts["bitmask"].make())
    if bool(bits[:, columns:].any()) or not bool((bits[:, :columns].reshape(-1, 4).sum(1) == 2).all()):
        raise stored.bad(f"{prefix}.bitmask", "does not have two bits of every four")
    return put_values(bits[:, :columns], parts["compressed"].make())


def _encoded(weight: Later, part: str) -> Tensor:
    dense = weight.make().contiguous()
    mask = _two_of_four(dense.float() != 0)
    return pack_bits(mask) if part == "bitmask" else dense[mask].view(len(dense), -1)


def _two_of_four(filled: Tensor) -> Tensor:
    """Return the mask with zeros added where a group of four has fewer than two, the earliest first."""
    fours = filled.view(-1, 4)
    missing = 2 - fours.sum(1, keepdim=True)
    extra = ~fours & ((~fours).cumsum(1) <= missing)
    return (fours | extra).view(filled.shape)
