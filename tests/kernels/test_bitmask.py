"""What is particular to `bitmask`: its integers behind a mask, and x that is not finite."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from oracle import call, cases, examples, expect, random, verify
from torch import Tensor

import zeroskip as zs
from zeroskip import _core
from zeroskip.formats.blob import Header
from zeroskip.quantize import LEAST, LIMIT

pytestmark = pytest.mark.kernels

CASES = [case for case in cases() if case[0] == "bitmask"]
each_kernel = pytest.mark.parametrize("case", CASES, ids=[case[2] for case in CASES])
each_integer = pytest.mark.parametrize("case", [case for case in CASES if case[1] in LIMIT], ids=lambda case: case[2])


def sections(blob: Tensor) -> list[bytes]:
    raw = blob.numpy().tobytes()
    table = [struct.unpack_from("<QQ", raw, 64 + 16 * i) for i in range(Header.of(blob).sections)]
    return [raw[offset : offset + nbytes] for offset, nbytes in table]


def rehash(blob: Tensor) -> None:
    digest = _core.hash_blob(blob.data_ptr(), blob.numel())
    blob[40:48] = torch.frombuffer(bytearray(struct.pack("<Q", digest)), dtype=torch.int8)


@pytest.mark.parametrize("values", LIMIT)
def test_layout_of_integers(values: str) -> None:
    """The bytes as docs/format.md has them, read one weight at a time."""
    m, k = 5, 200
    weight = torch.where(random(m, k, seed=1) > 0, random(m, k), 0.0)
    packed = zs.pack(weight, "bitmask", values, group_size=32)
    mask, offsets, stored, scales = sections(packed.blob)
    words = np.frombuffer(mask, "<u8").reshape(m, 4)  # 200 columns: two pairs of chunks
    starts = np.frombuffer(offsets, "<u8").astype(int)
    factors = np.frombuffer(scales, "<f2").reshape(m, 7)
    assert stored[-64:] == bytes(64) and len(stored) == starts[-1] + 64
    codes = torch.zeros(m, k)
    for row in range(m):
        at = starts[row]
        for pair in range(2):
            chosen = [[j for j in range(64) if int(words[row, 2 * pair + half]) >> j & 1] for half in (0, 1)]
            for half in (0, 1):
                for i, j in enumerate(chosen[half]):
                    if values == "int8":
                        code = stored[at + i + half * len(chosen[0])]
                    else:
                        code = stored[at + i] >> 4 * half & 15
                    codes[row, 128 * pair + 64 * half + j] = code + LEAST[values]
            at += sum(map(len, chosen)) if values == "int8" else max(map(len, chosen))
        assert at == starts[row + 1]
    assert packed.codes is not None and torch.equal(codes, packed.codes.float())
    spread = torch.from_numpy(factors.astype(np.float32)).repeat_interleave(32, 1)[:, :k]
    assert torch.equal(codes * spread, zs.unpack(packed))
    assert packed.nnz == int((codes != 0).sum())


@each_integer
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("scales", ["fp16", "fp32"])
def test_groups(case: tuple[str, str, str], size: int, scales: str) -> None:
    """Every size of a group, k short of one, exact, one over; from one token to several blocks of them."""
    name, values, kernel = case
    for m, k in [(1, 1), (33, 31), (18, 64), (17, 65), (34, 127), (5, 129), (20, 256), (16, 321)]:
        for i, weight in enumerate(examples(name, m, k, values, seed=k)):
            if i not in (0, 1, 4, 5, 6):
                continue
            packed = zs.pack(weight, name, values, size, scales)
            exact = zs.unpack(packed)
            for tokens in (1, 2, 3, 7, 8, 9, 17, 33):
                x = random(tokens, k, seed=tokens)
                verify(call(packed, x, kernel=kernel), exact, x, kernel=kernel, group_size=size)


@each_integer
def test_all_codes(case: tuple[str, str, str]) -> None:
    """The smallest and the largest code and byte of x everywhere: nothing saturates."""
    name, values, kernel = case
    for code in (LEAST[values], LIMIT[values]):
        for size in (32, 64, 128):
            weight = torch.full((17, 256), float(code))
            packed = zs.pack(weight, name, values, size, torch.ones(17, 256 // size))
            for tokens in (1, 8, 20):
                for sign in (1.0, -1.0):
                    x = torch.full((tokens, 256), 127.0 * sign)
                    assert torch.equal(call(packed, x, kernel=kernel), expect(weight, x)[0].float())


@each_integer
def test_panels_give_the_bits_of_dense(case: tuple[str, str, str]) -> None:
    """What is expanded into panels is multiplied as `dense` does."""
    name, values, kernel = case
    if "_panels_" not in kernel:
        return
    other = kernel.replace("_panels", "")
    for m, k, size in [(1, 1, 64), (3, 15, 32), (17, 130, 64), (64, 256, 128), (70, 333, 32), (31, 1000, 128)]:
        packed = zs.pack(next(examples(name, m, k, values, seed=k)), name, values, size)
        dense = zs.pack(zs.unpack(packed), "dense", values, size, packed.scales)
        assert packed.codes is not None and dense.codes is not None and torch.equal(packed.codes, dense.codes)
        for tokens in (1, 9, 16, 17, 33, 300):
            x = random(tokens, k, seed=tokens)
            wanted = call(dense, x, kernel=other.replace(name, "dense"))
            assert torch.equal(call(packed, x, kernel=kernel), wanted)


@pytest.mark.parametrize("values", LIMIT)
def test_where_nothing_was_measured_many_tokens_take_panels(values: str) -> None:
    row = zs.isa().active
    packed = zs.pack(next(examples("bitmask", 20, 64, values)), "bitmask", values)
    few, many = f"spmm_bitmask_{values}_{row}", f"spmm_bitmask_{values}_panels_{row}"
    if row == "amx":
        few, many = f"spmm_bitmask_{values}_avx512bf16", few
    assert [packed.kernel_for(tokens) for tokens in (1, 8, 9, 500)] == [few, few, many, many]


@each_kernel
def test_inf_and_nan_reach_the_rows_that_use_them(case: tuple[str, str, str]) -> None:
    """Each output is what adding w x gives: Inf with its sign, NaN from Inf - Inf, untouched where w is 0."""
    name, values, kernel = case
    m, k = 37, 150
    weight = next(examples(name, m, k, values, seed=3))
    packed = zs.pack(weight, name, values)
    exact = zs.unpack(packed).float()
    for tokens in (1, 2, 6, 8, 9, 17, 33, 70):
        x = random(tokens, k, seed=tokens)
        token = tokens // 2
        for columns, poison in [((5,), torch.inf), ((149,), torch.nan), ((0, 70, 140), -torch.inf)]:
            x[token, list(columns)] = 0
            expected = call(packed, x, kernel=kernel)
            for column in columns:
                expected[token] += torch.where(exact[:, column] != 0, exact[:, column] * poison, 0.0)
            poisoned = x.clone()
            poisoned[token, list(columns)] = poison
            y = call(packed, poisoned, kernel=kernel)
            torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@each_kernel
def test_the_largest_numbers(case: tuple[str, str, str]) -> None:
    """x so large that bf16 would round it to Inf, in a column that is not used."""
    name, values, kernel = case
    weight = next(examples(name, 20, 64, values, seed=3))
    weight[:, 9] = 0
    packed = zs.pack(weight, name, values)
    for tokens in (1, 5, 20):
        x = random(tokens, 64)
        x[:, 9] = torch.finfo(torch.float32).max
        assert call(packed, x, kernel=kernel).isfinite().all()


@pytest.mark.parametrize("values", LIMIT)
@pytest.mark.parametrize(
    ("section", "position", "value", "message"),
    [
        (0, 7, 0x55, "beyond the last column"),
        (0, 0, 0, "row_offsets do not follow from the bits"),
        (1, 8, 255, "row_offsets do not follow from the bits"),
        (1, 0, 1, "row_offsets do not run from 0"),
        (1, -1, 1, "row_offsets do not run from 0"),
        (2, -1, 1, "do not end in 64 bytes of zeros"),
        (3, 1, 0x7C, "scale is zero, negative or not finite"),
        (3, 1, 0xBC, "scale is zero, negative or not finite"),
    ],
)
def test_the_problem_is_named(values: str, section: int, position: int, value: int, message: str) -> None:
    weight = torch.ones(18, 48)
    weight[:, 1::2] = 0
    blob = zs.pack(weight, "bitmask", values).blob
    offset, nbytes = struct.unpack_from("<QQ", blob.numpy().tobytes(), 64 + 16 * section)
    blob.view(torch.uint8)[offset + position % nbytes] = value
    rehash(blob)
    with pytest.raises(zs.ZeroskipError, match=f"'bitmask': .*{message}"):
        zs.Packed.from_blob(blob)
