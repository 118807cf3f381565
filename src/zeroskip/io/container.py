"""The safetensors container: a writer that aligns and streams, and a reader of headers that believes nothing.

A file is 8 bytes (u64, length of the header), the header (JSON: name -> dtype, shape, data_offsets), the data. We pad
the header with spaces so that the data starts at a multiple of 4096: a mapped file then has its data on a page, and
every tensor placed at a multiple of 64 is aligned for vector loads where it lies. Any safetensors reader takes it.

Source: the safetensors format description; the padding and the order of the tensors are ours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from zeroskip.errors import ZeroskipError

__all__ = ["DTYPES", "PAGE", "Entry", "Later", "order", "read_header", "write"]

PAGE = 4096
CHUNK = 1 << 24  # bytes handed to write() at a time
MAX_HEADER = 100_000_000  # the limit of the safetensors library

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: dtype, shape, and its bytes [begin, end) counted from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class Later:
    """A tensor that is made when its turn to be written comes, so that never two such are in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def order(tensors: Mapping[str, Tensor | Later], blobs: Iterable[str]) -> list[str]:
    """Return the names as they go into the file, so that no gap is needed and everything is aligned.

    Blobs first (their lengths are multiples of 64), then tensors that fill whole multiples of 64 bytes, then the
    others from the widest dtype to the narrowest; in each group the order given.
    """
    first = set(blobs)

    def rank(name: str) -> tuple[int, int]:
        tensor = tensors[name]
        if name in first:
            return 0, 0
        return (1, 0) if tensor.nbytes % 64 == 0 else (2, -tensor.dtype.itemsize)

    return sorted(tensors, key=rank)


def write(path: Path, tensors: Mapping[str, Tensor | Later], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, one tensor at a time, and sync it.

    Parameters
    ----------
    path : Path
        A new file.
    tensors : mapping of str to Tensor or Later
        Any shape, on any device; written in this order without gaps. No more than one of them is copied at a time,
        and only if it is not contiguous in CPU memory.
    metadata : mapping of str to str

    Raises
    ------
    ZeroskipError
        If a dtype has no name in the format.
    OSError
        As the file system gives it.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise ZeroskipError(f"{name}: {tensor.dtype} cannot be stored in a safetensors file; cast it first")
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    if len(text) > MAX_HEADER:
        raise ZeroskipError(f"{path.name}: {len(tensors)} tensors make too long a header; use smaller shards")
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            _write_tensor(file, tensor if isinstance(tensor, Tensor) else tensor.make())
        file.flush()
        os.fsync(file.fileno())  # a full disk must show before the directory gets its name


def _write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    if tensor.numel() == 0:
        return
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    data = flat.numpy().data
    for start in range(0, len(data), CHUNK):
        file.write(data[start : start + CHUNK])


def read_header(path: Path) -> dict[str, Entry]:
    """Read and check the header of a safetensors file.

    Every offset is inside the file, every length follows from dtype and shape, and the tensors fill the data
    section in one piece without overlap. Nothing of the data is read.

    Returns
    -------
    dict of str to Entry
        In the order of the file.

    Raises
    ------
    ZeroskipError
        Naming the file, the tensor where there is one, and the problem.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                problem = f"{size} bytes cannot hold a header of {length}"
                raise ZeroskipError(f"{path}: not a safetensors file, or cut off: {problem}")
            text = file.read(length)
    except OSError as error:
        raise ZeroskipError(f"{path}: cannot be read: {error.strerror or error}") from error
    entries = {name: _entry(path, name, given, 8 + length, size) for name, given in _parse(path, text).items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            problem = "overlaps the one before it" if entry.begin < end else "leaves a gap before it"
            raise ZeroskipError(f"{path}: {name}: the tensor at byte {entry.begin} {problem} (expected {end})")
        end = entry.end
    if end != size:
        raise ZeroskipError(f"{path}: {size} bytes where the header says {end}; the file is damaged, fetch it again")
    return dict(sorted(entries.items(), key=lambda item: item[1].begin))


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ZeroskipError(f"{path}: the header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise ZeroskipError(f"{path}: the header is a {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    return header


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _entry(path: Path, name: str, given: Any, start: int, size: int) -> Entry:
    def bad(problem: str) -> ZeroskipError:
        return ZeroskipError(f"{path}: {name}: {problem}")

    if not isinstance(given, dict) or not {"dtype", "shape", "data_offsets"} <= set(given):
        raise bad("the header lacks its dtype, shape or data_offsets")
    dtype, shape, offsets = given["dtype"], given["shape"], given["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(f"unknown dtype {dtype!r}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise bad(f"shape {shape!r} or data_offsets {offsets!r} is not a list of whole numbers")
    begin, end = start + offsets[0], start + offsets[1]
    if not start <= begin <= end <= size:
        raise bad(f"data_offsets {offsets} reach outside the file of {size} bytes; it is damaged or cut off")
    if end - begin != prod(shape) * DTYPES[dtype].itemsize:
        raise bad(f"{end - begin} bytes for shape {shape} of {dtype}")
    return Entry(DTYPES[dtype], tuple(shape), begin, end)


def _sizes(values: Any) -> bool:
    if not isinstance(values, list) or len(values) > 64:
        return False
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)
