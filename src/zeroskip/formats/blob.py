"""The blob's bytes: header, section table, sections (docs/format.md)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zeroskip import _core
from zeroskip.errors import ZeroskipError

__all__ = ["VALUES", "Header", "build", "check", "sections"]

VALUES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of weights stored as numbers; the others are codes
_CODES = {"fp32": 1, "bf16": 2, "int8": 3, "int4": 4}
_NAMES = {code: name for name, code in _CODES.items()}
_SCALES = {"": 0, "fp32": 1, "fp16": 3}
_SCALE_NAMES = {code: name for name, code in _SCALES.items()}
_LAYOUT = struct.Struct("<8s8sIIQQQHBBHHIHBB")
_SECTION = struct.Struct("<QQ")
ALIGNMENT = 64  # bytes; of a blob and of each section in it
_MAGIC, _VERSION = b"ZEROSKIP", 1


@dataclass(frozen=True)
class Header:
    """The 64 header bytes.

    `n`, `group`, `strip` are N, M, V of `strip_nm` and 0 elsewhere; `group_size` (inputs that share a scale) and
    `scales` (``"fp16"`` or ``"fp32"``) belong to integer values.
    """

    format: str
    m: int
    k: int
    nnz: int
    values: str
    n: int = 0
    group: int = 0
    strip: int = 0
    nbytes: int = 0
    sections: int = 0
    hash: int = 0
    group_size: int = 0
    scales: str = ""

    def to_bytes(self) -> bytes:
        return _LAYOUT.pack(
            _MAGIC, self.format.encode(), self.m, self.k, self.nnz, self.nbytes, self.hash, _VERSION,
            _CODES[self.values], self.sections, self.n, self.group, self.strip, self.group_size,
            _SCALES[self.scales], 0,
        )  # fmt: skip

    @staticmethod
    def of(blob: Tensor) -> Header:
        """Read the header of a blob that `check` has passed."""
        raw = bytes(blob[:64].numpy())
        _, name, m, k, nnz, nbytes, digest, _, values, count, n, group, strip, size, scales, _ = _LAYOUT.unpack(raw)
        return Header(
            name.rstrip(b"\0").decode(), m, k, nnz, _NAMES[values], n, group, strip, nbytes, count, digest, size,
            _SCALE_NAMES[scales],
        )  # fmt: skip


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def build(header: Header, parts: Sequence[Tensor]) -> Tensor:
    """Put header and sections together.

    Parameters
    ----------
    header
        Without `nbytes`, `sections` and `hash`, which are filled in here.
    parts
        One tensor a section, any dtype, in the format's order; stored contiguously, row-major.

    Returns
    -------
    Tensor
        The blob, int8 [nbytes], 64-byte aligned.
    """
    raw = [part.contiguous().reshape(-1).view(torch.uint8) for part in parts]
    offset = _aligned(_LAYOUT.size + len(raw) * _SECTION.size)
    table = b""
    for part in raw:
        table += _SECTION.pack(offset, part.numel())
        offset += _aligned(part.numel())
    blob = torch.zeros(offset, dtype=torch.uint8)
    head = replace(header, nbytes=offset, sections=len(raw))
    at = _LAYOUT.size
    blob[at : at + len(table)] = torch.frombuffer(bytearray(table), dtype=torch.uint8)
    at = _aligned(at + len(table))
    for part in raw:
        blob[at : at + part.numel()] = part
        at += _aligned(part.numel())
    blob[:64] = torch.frombuffer(bytearray(head.to_bytes()), dtype=torch.uint8)
    digest = _core.hash_blob(blob.data_ptr(), offset)
    blob[:64] = torch.frombuffer(bytearray(replace(head, hash=digest).to_bytes()), dtype=torch.uint8)
    return blob.view(torch.int8)


def check(blob: Tensor) -> None:
    """Validate every byte that a kernel will follow.

    Raises
    ------
    ZeroskipError
        The tensor is not a 1-D contiguous int8 CPU tensor, or its bytes are no sound blob; the line says what is wrong.
    """
    if blob.dtype != torch.int8 or blob.dim() != 1 or not blob.is_contiguous() or blob.device.type != "cpu":
        raise ZeroskipError(
            f"a packed weight is a contiguous 1-D int8 tensor on the CPU, got {blob.dtype} {list(blob.shape)} "
            f"on {blob.device}"
        )
    try:
        _core.check(blob.data_ptr(), blob.numel())
    except ValueError as error:
        raise ZeroskipError(str(error)) from None


def sections(blob: Tensor) -> list[Tensor]:
    """The sections of a checked blob, as uint8 views."""
    raw = blob.view(torch.uint8)
    count = Header.of(blob).sections
    table = _SECTION.iter_unpack(bytes(raw[_LAYOUT.size : _LAYOUT.size + count * _SECTION.size].numpy()))
    return [raw[offset : offset + nbytes] for offset, nbytes in table]
