"""What a format is, and a weight packed in one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from zeroskip import _core
from zeroskip.errors import ZeroskipError, expect, suggest
from zeroskip.formats import blob as blobs
from zeroskip.formats.blob import VALUES, Header
from zeroskip.quantize import BITS, LIMIT, Quantized, quantize

__all__ = ["Format", "Packed", "get", "names", "pack", "unpack", "value_types"]

_registry: dict[str, Format] = {}


class Format(ABC):
    """A layout of a weight. A subclass with a `name` registers itself; its kernel is csrc/kernels/spmm_<name>.

    The methods are pure: inputs are never modified. `weight` is [m, k], fp32 or bf16, finite, its zeros +0.0.

    Attributes
    ----------
    values
        The value types that it stores. One that names an integer type has `pack_codes` and `unpack_codes`.
    """

    name: ClassVar[str]
    values: ClassVar[tuple[str, ...]] = tuple(VALUES)

    def __init_subclass__(cls) -> None:
        _registry[cls.name] = cls()

    @abstractmethod
    def accepts(self, weight: Tensor) -> str | None:
        """None if this format can hold `weight` [m, k], else the reason in words."""

    @abstractmethod
    def pack(self, weight: Tensor) -> Tensor:
        """The blob of `weight` [m, k], whose dtype is the stored value type."""

    @abstractmethod
    def unpack(self, header: Header, sections: list[Tensor]) -> Tensor:
        """The weight [m, k] in the stored value type, from the uint8 sections of a checked blob."""

    def pack_codes(self, weight: Quantized) -> Tensor:
        """The blob of a weight given as integers."""
        raise NotImplementedError(f"{self.name} stores no integers")

    def unpack_codes(self, header: Header, sections: list[Tensor]) -> Quantized:
        """What `pack_codes` was given, from the uint8 sections of a checked blob."""
        raise NotImplementedError(f"{self.name} stores no integers")

    def pattern(self, header: Header) -> str:
        """The sparsity pattern that the layout guarantees."""
        return "unstructured"


class Packed:
    """A packed weight: a validated blob and what it says of itself.

    Attributes
    ----------
    blob
        int8 [nbytes].
    format, values, pattern
        Names, such as ``"strip_nm"``, ``"bf16"``, ``"8:16@64"``.
    shape
        (m, k) of the weight.
    nnz, nbytes, sparsity
        Non-zeros, size of the blob in bytes, fraction of zeros.
    group_size
        Inputs that share a scale; None unless the values are integers.
    """

    def __init__(self, blob: Tensor) -> None:
        blobs.check(blob)
        header = Header.of(blob)
        self.blob, self._header = blob, header
        self.format, self.values = header.format, header.values
        self.shape = (header.m, header.k)
        self.nnz, self.nbytes = header.nnz, header.nbytes
        self.sparsity = 1.0 - header.nnz / (header.m * header.k)
        self.pattern = get(header.format).pattern(header)
        self.group_size = header.group_size or None

    @classmethod
    def from_blob(cls, blob: Tensor) -> Packed:
        """Read a blob of any origin; raises ZeroskipError if it is not sound."""
        return cls(blob)

    @property
    def codes(self) -> Tensor | None:
        """int8 [m, k], read from the blob; None unless the values are integers."""
        return self._quantized().codes if self.group_size else None

    @property
    def scales(self) -> Tensor | None:
        """fp16 or fp32 [m, ceil(k / group_size)], read from the blob; None unless the values are integers."""
        return self._quantized().scales if self.group_size else None

    def _quantized(self) -> Quantized:
        return get(self.format).unpack_codes(self._header, blobs.sections(self.blob))

    def kernel_for(self, tokens: int) -> str:
        """The kernel that serves a call with this many tokens in this process."""
        return _core.chosen(self.blob.data_ptr(), self.blob.numel(), tokens)

    @property
    def kernel(self) -> str:
        """The kernel that serves a single token."""
        return self.kernel_for(1)

    def __repr__(self) -> str:
        m, k = self.shape
        return f"Packed({self.format} {self.values} {m}x{k}, sparsity {self.sparsity:.3f}, {self.nbytes} bytes)"


def names() -> list[str]:
    """The names of all formats."""
    return list(_registry)


def value_types() -> tuple[str, ...]:
    """The value types that some format stores, from wide to narrow."""
    bits = {name: 8 * dtype.itemsize for name, dtype in VALUES.items()} | BITS
    every = {values for format in _registry.values() for values in format.values}
    return tuple(sorted(every, key=bits.__getitem__, reverse=True))


def get(name: str) -> Format:
    """The format of this name; an unknown one raises ZeroskipError."""
    if not isinstance(name, str) or name not in _registry:
        raise ZeroskipError(f"unknown format {name!r}{suggest(name, _registry)}")
    return _registry[name]


def _value_type(weight: Tensor, chosen: Format, values: str | None) -> str:
    if values is None:
        own = next((name for name, dtype in VALUES.items() if dtype == weight.dtype), None)
        if own is None:
            raise ZeroskipError(f"a weight of {weight.dtype} needs values='fp32' or values='bf16'")
        return own
    if values not in (known := [*VALUES, *LIMIT]):
        raise ZeroskipError(f"unknown value type {values!r}{suggest(values, known)}")
    if values not in chosen.values:
        able = ", ".join(name for name in names() if values in get(name).values) or "none yet"
        raise ZeroskipError(f"format {chosen.name!r} stores no {values} (formats that do: {able})")
    return values


def pack(
    weight: Tensor,
    format: str = "bitmask",
    values: str | None = None,
    group_size: int | None = None,
    scales: str | Tensor = "fp16",
) -> Packed:
    """Pack a weight.

    Parameters
    ----------
    weight
        [m, k], floating point, finite; not modified. Zeros of either sign are stored as +0.0.
    format
        A name of `zeroskip.formats()`.
    values
        ``"fp32"``, ``"bf16"``, ``"int8"`` or ``"int4"``, whichever the format stores (`Format.values`); None keeps
        the weight's own type (fp16 must choose).
    group_size
        For integers: 32, 64 or 128 inputs share a scale; None means 64. The last group may be shorter.
    scales
        For integers: ``"fp16"`` or ``"fp32"`` computes them, the largest weight of a row's group over 127 or 7, which
        has to fit the type. A tensor [m, ceil(k / group_size)] is used exactly, so that codes of a solver (weight =
        code * scale) are reproduced; a weight beyond the codes gets the last, at most half of it.

    Raises
    ------
    ZeroskipError
        Not a finite 2-D weight, an unknown name, or a weight that the format cannot hold; the line says why.
    """
    expect("weight", weight, Tensor, "a tensor [m, k]")
    if weight.layout is not torch.strided:
        raise ZeroskipError(f"weight is no plain dense tensor ({weight.layout}): call .to_dense() first")
    chosen = get(format)
    values = _value_type(weight, chosen, values)
    if values in VALUES and (group_size is not None or isinstance(scales, Tensor)):
        given = "scales" if group_size is None else f"group_size {group_size}"
        raise ZeroskipError(f"{given} belongs to integer values: leave it out with {values}")
    if weight.dim() != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise ZeroskipError(f"a weight is a non-empty floating-point [m, k], got {weight.dtype} {list(weight.shape)}")
    if weight.device.type != "cpu":
        raise ZeroskipError(f"weights are packed on the CPU, this one is on {weight.device}: call .cpu() first")
    stored = weight.detach().to(VALUES.get(values, torch.float32)) + 0.0  # -0.0 becomes +0.0
    if not torch.isfinite(stored).all():
        raise ZeroskipError(f"the weight has NaN or Inf (as {stored.dtype}): repair it before packing")
    if (reason := chosen.accepts(stored)) is not None:
        raise ZeroskipError(f"format {format!r} cannot hold this weight: {reason}")
    if values in LIMIT:
        return Packed(chosen.pack_codes(quantize(stored, values, group_size, scales)))
    return Packed(chosen.pack(stored))


def unpack(packed: Packed) -> Tensor:
    """The weight [m, k]: bit-equal to what was packed, or, of integers, code * scale in fp32."""
    expect("packed", packed, Packed, "what pack() returns")
    if packed.group_size:
        return packed._quantized().dequantize()
    return get(packed.format).unpack(Header.of(packed.blob), blobs.sections(packed.blob))
