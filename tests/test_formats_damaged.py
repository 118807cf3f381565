"""Blobs that were edited: what is not refused must be safe to use."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
import torch
from oracle import call, example, expect, random
from torch import Tensor

import zeroskip as zs
from zeroskip import _core
from zeroskip.formats.base import get, names
from zeroskip.formats.blob import Header

KINDS = [(name, values) for name in names() for values in get(name).values]
each_kind = pytest.mark.parametrize(("name", "values"), KINDS, ids=["-".join(kind) for kind in KINDS])


def rehash(blob: Tensor) -> None:
    digest = _core.hash_blob(blob.data_ptr(), blob.numel())
    blob[40:48] = torch.frombuffer(bytearray(struct.pack("<Q", digest)), dtype=torch.int8)


def refused_or_safe(blob: Tensor) -> bool:
    """True if refused with one line; otherwise the blob is unpacked and multiplied with."""
    try:
        packed = zs.Packed.from_blob(blob)
    except zs.ZeroskipError as error:
        assert "\n" not in str(error)
        return True
    m, k = packed.shape
    if m * k < 1 << 22:
        zs.unpack(packed)
        for tokens in (1, 9):
            call(packed, torch.ones(tokens, k))
    return False


@each_kind
def test_a_changed_byte_is_refused(name: str, values: str) -> None:
    original = zs.pack(example(name, 18, 48, values), name, values).blob
    blob = original.clone()
    for at in range(0, len(blob), 1 if len(blob) < 3000 else 7):
        blob[at] ^= 1 << at % 8
        with pytest.raises(zs.ZeroskipError):
            zs.Packed.from_blob(blob)
        blob[at] = original[at]
    zs.Packed.from_blob(blob)


@each_kind
def test_a_changed_byte_with_a_new_hash_is_refused_or_safe(name: str, values: str) -> None:
    """Every byte of header, table and sections, with a hash that fits again."""
    original = zs.pack(example(name, 18, 48, values), name, values).blob
    values_start, _ = struct.unpack_from("<QQ", original.numpy().tobytes(), 48 + 16 * Header.of(original).sections)
    refused = 0
    for value in (0, 1, 0x7F, -1):
        dense = range(48, values_start, 1 if value == -1 else 3)
        for at in [*range(40), *dense, *range(values_start, len(original), 61)]:
            if original[at] == value:
                continue
            blob = original.clone()
            blob[at] = value
            rehash(blob)
            refused += refused_or_safe(blob)
    assert refused > 100


@each_kind
def test_huge_numbers_in_the_header_are_refused_or_safe(name: str, values: str) -> None:
    original = zs.pack(example(name, 18, 48, values), name, values).blob
    header = Header.of(original)
    huge = [0, 1, 15, 65, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
    edits: list[dict[str, int]] = [{field: value} for field in ("m", "k", "strip") for value in huge]
    edits += [{"m": a, "k": b} for a in huge for b in huge]
    edits += [{"nnz": value} for value in (0, 1, 2**40, 2**61, 2**62, 2**63, 2**64 - 1)]
    edits += [{"m": 2**31 - 1, "k": 2**31 - 1, "nnz": value} for value in (2**61, 2**62 - 2**32 + 1)]
    edits += [{"n": a, "group": b} for a in (0, 1, 3, 65535) for b in (0, 1, 3, 64, 128, 65535)]
    for edit in edits:
        blob = original.clone()
        blob[:64] = torch.frombuffer(bytearray(replace(header, **edit).to_bytes()), dtype=torch.int8)
        rehash(blob)
        refused_or_safe(blob)


@each_kind
def test_truncated_extended_or_foreign(name: str, values: str) -> None:
    blob = zs.pack(example(name, 18, 48, values), name, values).blob
    for length in (0, 1, 63, 64, 65, 128, len(blob) - 64, len(blob) - 1):
        with pytest.raises(zs.ZeroskipError):
            zs.Packed.from_blob(blob[:length].clone())
    with pytest.raises(zs.ZeroskipError, match="truncated or extended"):
        zs.Packed.from_blob(torch.cat([blob, torch.zeros(64, dtype=torch.int8)]))
    for wrong in (blob.view(torch.uint8), blob.view(-1, 64), torch.stack([blob, blob], 1)[:, 0]):
        with pytest.raises(zs.ZeroskipError, match="contiguous 1-D int8"):
            zs.Packed.from_blob(wrong)
    with pytest.raises(zs.ZeroskipError, match="not a zeroskip blob"):
        zs.Packed.from_blob(torch.zeros(4096, dtype=torch.int8))


@pytest.mark.parametrize(
    ("name", "section", "position", "value", "message"),
    [
        ("csr", 0, 8, 255, "row_offsets"),
        ("csr", 0, 0, 1, "row_offsets do not run from 0 to nnz"),
        ("csr", 1, 1, 127, "column"),
        ("csr", 1, 2, 0, "ascend"),
        ("bitmask", 0, 7, 255, "beyond the last column"),
        ("bitmask", 0, 0, 0, "row_offsets do not follow from the bits"),
        ("bitmask", 1, 8, 255, "row_offsets do not follow from the bits"),
        ("bitmask", 2, -1, 1, "do not end in 64 bytes of zeros"),
        ("strip_nm", 0, 0, 100, "column"),
        ("strip_nm", 0, 1, 0, "ascend"),
    ],
)
def test_the_problem_is_named(name: str, section: int, position: int, value: int, message: str) -> None:
    weight = torch.ones(18, 48)
    weight[:, 1::2] = 0
    blob = zs.pack(weight, name).blob
    offset, nbytes = struct.unpack_from("<QQ", blob.numpy().tobytes(), 64 + 16 * section)
    blob.view(torch.uint8)[offset + position % nbytes] = value
    rehash(blob)
    with pytest.raises(zs.ZeroskipError, match=f"'{name}': .*{message}"):
        zs.Packed.from_blob(blob)


@each_kind
def test_a_misaligned_blob_computes(name: str, values: str) -> None:
    """A blob that a foreign writer left unaligned is copied, not refused."""
    weight = example(name, 18, 48, values)
    blob = zs.pack(weight, name, values).blob
    store = torch.zeros(len(blob) + 64, dtype=torch.int8)
    view = store[1 : 1 + len(blob)]
    view.copy_(blob)
    x = random(3, 48)
    y = torch.ops.zeroskip.linear(x, view, None, 18, 0)
    expected, bound = expect(weight, x, kernel=zs.Packed.from_blob(blob).kernel_for(3))
    assert ((y - expected).abs() <= bound).all()
