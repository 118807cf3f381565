"""What a format is, and a weight packed in one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from zeroskip import _core
from zeroskip.errors import ZeroskipError, suggest
from zeroskip.formats import blob as blobs
from zeroskip.formats.blob import VALUES, Header

__all__ = ["Format", "Packed", "get", "names", "pack", "unpack"]

_registry: dict[str, Format] = {}


class Format(ABC):
    """A layout of a weight. A subclass with a `name` registers itself; its kernel is csrc/kernels/spmm_<name>.

    The methods are pure: inputs are never modified. `weight` is [m, k], fp32 or bf16, finite, its zeros +0.0.
    """

    name: ClassVar[str]

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

    @classmethod
    def from_blob(cls, blob: Tensor) -> Packed:
        """Read a blob of any origin; raises ZeroskipError if it is not sound."""
        return cls(blob)

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


def get(name: str) -> Format:
    """The format of this name; an unknown one raises ZeroskipError."""
    if name not in _registry:
        raise ZeroskipError(f"unknown format {name!r}{suggest(name, _registry)}")
    return _registry[name]


def _value_type(weight: Tensor, values: str | None) -> torch.dtype:
    if values in ("int8", "int4"):
        raise ZeroskipError(f"values {values!r} are not stored yet: use 'fp32' or 'bf16'")
    if values is not None:
        if values not in VALUES:
            raise ZeroskipError(f"unknown value type {values!r}{suggest(values, VALUES)}")
        return VALUES[values]
    if weight.dtype not in VALUES.values():
        raise ZeroskipError(f"a weight of {weight.dtype} needs values='fp32' or values='bf16'")
    return weight.dtype


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
        ``"fp32"`` or ``"bf16"``; None keeps the weight's own type (fp16 must choose).
    group_size, scales
        For integer values, which are not stored yet.

    Raises
    ------
    ZeroskipError
        Not a finite 2-D weight, an unknown name, or a weight that the format cannot hold; the line says why.
    """
    chosen = get(format)
    dtype = _value_type(weight, values)
    if group_size is not None:
        raise ZeroskipError(f"group_size {group_size} is for integer values: leave it out with {values or 'this type'}")
    if weight.dim() != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise ZeroskipError(f"a weight is a non-empty floating-point [m, k], got {weight.dtype} {list(weight.shape)}")
    if weight.device.type != "cpu":
        raise ZeroskipError(f"weights are packed on the CPU, this one is on {weight.device}: call .cpu() first")
    stored = weight.detach().to(dtype) + 0.0  # -0.0 becomes +0.0
    if not torch.isfinite(stored).all():
        raise ZeroskipError(f"the weight has NaN or Inf (as {dtype}): repair it before packing")
    if (reason := chosen.accepts(stored)) is not None:
        raise ZeroskipError(f"format {format!r} cannot hold this weight: {reason}")
    return Packed(chosen.pack(stored))


def unpack(packed: Packed) -> Tensor:
    """The weight [m, k] in the stored value type, bit-equal to what was packed."""
    return get(packed.format).unpack(Header.of(packed.blob), blobs.sections(packed.blob))
