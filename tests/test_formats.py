"""Pack, unpack and the bytes between them: every format of the registry."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import SPARSIFIERS, call, example, examples, mask_strips, random, stored, verify
from torch import Tensor

import zeroskip as zs
from zeroskip.formats.base import get, names
from zeroskip.formats.blob import VALUES, Header
from zeroskip.formats.strip_nm import detect

KINDS = [(name, values) for name in names() for values in get(name).values]
FLOAT_KINDS = [kind for kind in KINDS if kind[1] in VALUES]
each_kind = pytest.mark.parametrize(("name", "values"), KINDS, ids=["-".join(kind) for kind in KINDS])
each_values = pytest.mark.parametrize("values", VALUES)


def bits(weight: Tensor) -> Tensor:
    return weight.view(torch.int16 if weight.dtype == torch.bfloat16 else torch.int32)


def positive_zeros(weight: Tensor) -> Tensor:
    return torch.where(weight == 0, torch.zeros_like(weight), weight)


# pack and unpack


@each_kind
def test_unpack_is_bit_equal(name: str, values: str) -> None:
    for m, k in [(1, 1), (1, 2), (15, 16), (16, 32), (17, 33), (37, 61), (64, 64), (70, 130), (130, 48)]:
        for weight in examples(name, m, k, values, seed=m):
            weight[0, 0] = 0
            weight = stored(weight, values)
            weight[0, 0] = -0.0
            if get(name).accepts(weight) is not None:
                continue
            before = weight.clone()
            packed = zs.pack(weight, name, values)
            assert torch.equal(bits(weight), bits(before)), "the input was modified"
            assert torch.equal(bits(zs.unpack(packed)), bits(positive_zeros(weight)))
            assert (packed.format, packed.values, packed.shape) == (name, values, (m, k))
            assert packed.nnz == int(torch.count_nonzero(weight))
            assert packed.nbytes == packed.blob.numel() and packed.nbytes % 64 == 0
            assert packed.blob.data_ptr() % 64 == 0
            assert packed.kernel.startswith(f"spmm_{name}_{values}_")


SPECIAL = torch.tensor([0x0001, 0x007F, 0x0080, 0x7F7F, -0x8000, -0x7FFF, -0x0081, 0x3F80], dtype=torch.int16)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(FLOAT_KINDS),
    m=st.integers(1, 80),
    k=st.integers(1, 140),
    sparsify=st.sampled_from(sorted(SPARSIFIERS)),
    seed=st.integers(0, 2**16),
)
def test_any_bits_survive(kind: tuple[str, str], m: int, k: int, sparsify: str, seed: int) -> None:
    """Any finite bit pattern, subnormals, the largest numbers and -0.0 included."""
    name, values = kind
    generator = torch.Generator().manual_seed(seed)
    high = torch.randint(-(2**15), 2**15, (m, k), generator=generator, dtype=torch.int16)
    high = torch.where(torch.rand(m, k, generator=generator) < 0.2, SPECIAL[high.long() % len(SPECIAL)], high)
    if values == "bf16":
        weight = high.view(torch.bfloat16)
    else:
        low = torch.randint(0, 2**16, (m, k), generator=generator, dtype=torch.int32)
        weight = (high.to(torch.int32) << 16 | low).view(torch.float32)
    weight = torch.where(torch.isfinite(weight), weight, torch.ones_like(weight))
    weight = torch.where(SPARSIFIERS[sparsify](m, k, generator), weight, torch.full_like(weight, -0.0))
    reason = get(name).accepts(positive_zeros(weight))
    if reason is not None:
        with pytest.raises(zs.ZeroskipError, match="cannot hold"):
            zs.pack(weight, name)
        return
    assert torch.equal(bits(zs.unpack(zs.pack(weight, name))), bits(positive_zeros(weight)))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    m=st.integers(1, 80),
    k=st.integers(1, 140),
    tokens=st.integers(1, 70),
    sparsify=st.sampled_from(sorted(SPARSIFIERS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_linear_keeps_its_bound(
    kind: tuple[str, str], m: int, k: int, tokens: int, sparsify: str, dtype: torch.dtype, seed: int
) -> None:
    name, values = kind
    mask = SPARSIFIERS[sparsify](m, k, torch.Generator().manual_seed(seed))
    weight = stored(torch.where(mask, random(m, k, seed=seed), 0.0), values)
    if get(name).accepts(weight) is not None:
        return
    packed = zs.pack(weight, name, values)
    x, bias = random(tokens, k, seed=seed + 1, dtype=dtype), random(m, seed=seed + 2)
    verify(call(packed, x, bias), weight, x, bias, kernel=packed.kernel_for(tokens))


@each_kind
def test_a_wide_weight(name: str, values: str) -> None:
    """More columns than 16 bits count."""
    weight = example(name, 3, 65600, values)
    weight[:, -1] = weight[:, 65535] = 1
    weight = stored(weight, values)
    if get(name).accepts(weight) is None:
        assert torch.equal(bits(zs.unpack(zs.pack(weight, name, values))), bits(weight))


def test_values_may_be_converted() -> None:
    weight = random(20, 32, dtype=torch.float16)
    assert torch.equal(zs.unpack(zs.pack(weight, "csr", "bf16")), weight.bfloat16())
    assert torch.equal(zs.unpack(zs.pack(weight, "csr", "fp32")), weight.float())
    assert zs.pack(weight.float().t(), "bitmask").shape == (32, 20)  # any strides


# What docs/format.md says of the bytes, read by the letter


def read(blob: Tensor) -> tuple[Header, list[bytes]]:
    raw = blob.numpy().tobytes()
    header = Header.of(blob)
    table = [struct.unpack_from("<QQ", raw, 64 + 16 * i) for i in range(header.sections)]
    for offset, nbytes in table:
        assert offset % 64 == 0
        assert not any(raw[offset + nbytes : offset + -(-nbytes // 64) * 64]), "padding is not zero"
    return header, [raw[offset : offset + nbytes] for offset, nbytes in table]


@each_values
def test_layout_of_csr(values: str) -> None:
    for m, k, index in [(7, 45, "<u2"), (2, 70000, "<u4")]:
        weight = example("csr", m, k, values)
        header, (offsets, columns, stored) = read(zs.pack(weight, "csr").blob)
        assert header.nnz == int((weight != 0).sum())
        starts = np.frombuffer(offsets, "<u8")
        rows = np.repeat(np.arange(m), np.diff(starts).astype(int))
        read_back = torch.zeros_like(weight)
        column = torch.from_numpy(np.frombuffer(columns, index).astype(np.int64))
        read_back[torch.from_numpy(rows), column] = torch.frombuffer(bytearray(stored), dtype=weight.dtype)
        assert torch.equal(read_back, weight)


@each_values
def test_layout_of_bitmask(values: str) -> None:
    weight = example("bitmask", 7, 45, values)
    _, (mask, offsets, stored) = read(zs.pack(weight, "bitmask").blob)
    words = np.frombuffer(mask, "<u4").reshape(7, 2)
    starts = np.frombuffer(offsets, "<u8").astype(int)
    assert stored[-64:] == bytes(64)
    numbers = torch.frombuffer(bytearray(stored[:-64]), dtype=weight.dtype)
    for row in range(7):
        columns = [j for j in range(64) if words[row, j // 32] >> (j % 32) & 1]
        assert columns == (weight[row] != 0).nonzero().flatten().tolist()
        assert torch.equal(numbers[starts[row] : starts[row + 1]], weight[row, columns])


@each_values
def test_layout_of_strip_nm(values: str) -> None:
    weight = torch.where(mask_strips(40, 80, 16, torch.Generator().manual_seed(0)), random(40, 80), 0.0)
    weight = weight.to(VALUES[values])
    header, (columns, stored) = read(zs.pack(weight, "strip_nm").blob)
    assert (header.n, header.group, header.strip) == (8, 16, 16)
    assert len(columns) == 3 * 40
    width = 40 if values == "fp32" else 64  # bf16 columns are padded to 32
    panels = torch.frombuffer(bytearray(stored), dtype=weight.dtype)
    panels = panels.view(3, width, 16) if values == "fp32" else panels.view(3, width // 2, 16, 2)
    for row in range(40):
        for j in range(40):
            chunk = j // 32 * 64
            kept = weight[row, chunk + columns[row // 16 * 40 + j]]
            place = (row // 16, j, row % 16) if values == "fp32" else (row // 16, j // 2, row % 16, j % 2)
            assert panels[place] == kept


# strip_nm finds its pattern


def strips(m: int, k: int, n: int, group: int, strip: int, seed: int = 0) -> Tensor:
    score = torch.rand(-(-m // strip), k // group, group, generator=torch.Generator().manual_seed(seed))
    kept = (score.argsort(2).argsort(2) < n).flatten(1).repeat_interleave(strip, 0)[:m]
    return torch.where(kept, random(m, k, seed=seed) + 10, 0.0)


@pytest.mark.parametrize(
    "pattern",
    [(2, 4, 64), (8, 16, 64), (8, 16, 128), (1, 4, 16), (16, 32, 32), (32, 64, 64), (1, 2, 16), (3, 8, 32)],
    ids=lambda p: "{}:{}@{}".format(*p),
)
def test_detects_what_was_made(pattern: tuple[int, int, int]) -> None:
    n, group, strip = pattern
    weight = strips(300, 192, n, group, strip)
    assert detect(weight) == pattern
    packed = zs.pack(weight, "strip_nm")
    assert packed.pattern == f"{n}:{group}@{strip}"
    assert torch.equal(zs.unpack(packed), weight)


def test_detection_takes_the_largest_strip_and_then_the_smallest_group() -> None:
    alternate = torch.zeros(256, 128)
    alternate[:, ::2] = 1  # also 2:4, 4:8, ... and also every smaller strip
    assert detect(alternate) == (1, 2, 128)


def test_detection_stores_the_least() -> None:
    """A fit at a coarse strip that leaves little out loses to a fine one that leaves out more."""
    weight = strips(64, 64, 1, 4, 16, seed=3)
    assert detect(weight) == (1, 4, 16)


def test_detection_with_a_short_last_strip_and_odd_inputs() -> None:
    assert detect(strips(70, 48, 2, 4, 64)) == (2, 4, 64)
    assert detect(strips(70, 36, 2, 4, 64)) == (2, 4, 64)  # 8 and more do not divide 36
    assert detect(strips(70, 6, 1, 2, 128)) == (1, 2, 128)


@pytest.mark.parametrize("m", [1, 16, 40])
def test_detection_refuses(m: int) -> None:
    assert detect(torch.ones(m, 64)) is None
    assert detect(torch.ones(m, 7)) is None
    assert detect(torch.zeros(m, 7)) is None  # M must divide the inputs
    with pytest.raises(zs.ZeroskipError, match="no N:M@V fits"):
        zs.pack(torch.ones(m, 64), "strip_nm")


def test_unused_columns_inside_the_pattern() -> None:
    """Strips that use fewer than N columns of a group, or none."""
    weight = strips(64, 64, 2, 4, 16)
    weight[:16] = 0
    weight[16:32, 4:8] = 0
    assert torch.equal(zs.unpack(zs.pack(weight, "strip_nm")), weight)
    assert detect(torch.zeros(64, 64)) == (1, 64, 128)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.tensor([[1.0, float("nan")]])}, "NaN or Inf"),
        ({"weight": torch.tensor([[1.0, float("inf")]])}, "NaN or Inf"),
        ({"weight": torch.ones(2, 2, 2)}, "non-empty floating-point"),
        ({"weight": torch.ones(0, 2)}, "non-empty floating-point"),
        ({"weight": torch.ones(2, 2, dtype=torch.int8), "values": "fp32"}, "non-empty floating-point"),
        ({"weight": torch.ones(2, 2, dtype=torch.float16)}, "needs values="),
        ({"weight": torch.eye(4).to_sparse()}, "no plain dense tensor .torch.sparse_coo.: call .to_dense"),
        ({"weight": torch.full((2, 2), 1e300, dtype=torch.float64), "values": "fp32"}, "NaN or Inf"),
        ({"values": "int8", "format": "csr"}, "format 'csr' stores no int8 .formats that do: .*dense"),
        ({"values": "int4", "format": "strip_nm"}, "stores no int4"),
        ({"values": "fp8"}, "unknown value type"),
        ({"group_size": 64}, "group_size 64"),
        ({"format": "bitmaks"}, "did you mean 'bitmask'"),
    ],
    ids=str,
)
def test_pack_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(zs.ZeroskipError, match=message):
        zs.pack(**{"weight": torch.ones(2, 2), **arguments})  # type: ignore[arg-type]
