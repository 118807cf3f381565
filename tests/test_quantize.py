"""Integers with group scales: rounding, scales that are given, the bytes of `dense`, and blobs that lie."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import call, random, verify
from torch import Tensor
from torch.nn.functional import pad

import zeroskip as zs
from zeroskip import _core
from zeroskip.formats.base import get, names
from zeroskip.ops import kernels
from zeroskip.planning.candidates import pack_as
from zeroskip.prune.base import Integers
from zeroskip.prune.scales import group_scales
from zeroskip.quantize import GROUPS, LEAST, LIMIT, SCALES, codes_of, fits_fp16, group_of, quantize

KINDS = [(name, values) for name in names() for values in get(name).values if values in LIMIT]
each_kind = pytest.mark.parametrize(("name", "values"), KINDS, ids=["-".join(kind) for kind in KINDS])
each_group = pytest.mark.parametrize("group", GROUPS)


def spread(scales: Tensor, group: int, k: int) -> Tensor:
    return scales.double().repeat_interleave(group, 1)[:, :k]


@settings(max_examples=80, deadline=None)
@given(
    values=st.sampled_from(sorted(LIMIT)),
    group=st.sampled_from(GROUPS),
    kind=st.sampled_from(sorted(SCALES)),
    m=st.integers(1, 20),
    k=st.integers(1, 300),
    power=st.integers(-30, 15),
    seed=st.integers(0, 2**16),
)
def test_rounding_is_to_the_nearest_code(
    values: str, group: int, kind: str, m: int, k: int, power: int, seed: int
) -> None:
    weight = random(m, k, seed=seed) * 2.0**power
    weight[random(m, k, seed=seed + 1) < 0] = 0
    if kind == "fp16" and not fits_fp16(weight, values):
        with pytest.raises(zs.ZeroskipError, match="too small for fp16 scales"):
            quantize(weight, values, group, kind)
        return
    made = quantize(weight, values, group, kind)
    assert made.scales.dtype == SCALES[kind] and made.scales.shape == (m, -(-k // group))
    assert made.codes.abs().max() <= LIMIT[values]
    assert not made.codes[weight == 0].any()
    step = spread(made.scales, group, k)
    assert ((made.dequantize().double() - weight.double()).abs() <= step * 0.5001).all()
    again = quantize(made.dequantize(), values, group, made.scales)
    assert torch.equal(again.codes, made.codes) and torch.equal(again.scales, made.scales)


@each_kind
@each_group
def test_given_codes_and_scales_come_back(name: str, values: str, group: int) -> None:
    """Every code of the type, any positive scale."""
    generator = torch.Generator().manual_seed(group)
    for k in (group, 5 * group, 3 * group - 7):
        codes = torch.randint(LEAST[values], LIMIT[values] + 1, (37, k), generator=generator, dtype=torch.int8)
        for dtype in (torch.float16, torch.float32, torch.bfloat16):
            scales = (torch.rand(37, -(-k // group), generator=generator) * 0.1 + 0.001).to(dtype)
            weight = codes.float() * spread(scales, group, k).float()
            packed = zs.pack(weight, name, values, group, scales)
            assert packed.group_size == group and packed.scales is not None and packed.codes is not None
            assert torch.equal(packed.codes, codes) and torch.equal(packed.scales.double(), scales.double())
            assert torch.equal(zs.unpack(packed), weight)
            assert packed.nnz == int(torch.count_nonzero(codes))
            half = zs.pack(weight.to(torch.float16), name, values, group, scales)  # rounded weights: the same codes
            assert torch.equal(half.blob, packed.blob)


@each_kind
@each_group
def test_kernels_take_any_group_and_scale(name: str, values: str, group: int) -> None:
    for kind in SCALES:
        for m, k in [(33, 3 * group), (18, group + 5), (16, 31)]:
            packed = zs.pack(random(m, k, seed=k), name, values, group, kind)
            for kernel in kernels(packed):
                for tokens in (1, 2, 6, 17, 40):
                    x = random(tokens, k, seed=tokens)
                    x[:, : min(k, group)] *= 100  # a scale for the whole token would drown the other groups
                    verify(call(packed, x, kernel=kernel), zs.unpack(packed), x, kernel=kernel, group_size=group)


@each_kind
def test_a_token_does_not_see_its_batch(name: str, values: str) -> None:
    packed = zs.pack(random(50, 200), name, values)
    x = random(70, 200, seed=1)
    every = zs.linear(packed, x)
    for kernel in kernels(packed):
        every = call(packed, x, kernel=kernel)
        for first, last in [(0, 1), (3, 5), (20, 37), (69, 70)]:
            assert torch.equal(call(packed, x[first:last].clone(), kernel=kernel), every[first:last]), kernel


@each_kind
def test_inf_and_nan_spoil_their_token_only(name: str, values: str) -> None:
    packed = zs.pack(random(20, 100), name, values)
    assert packed.codes is not None
    used = (packed.codes[:, 99] != 0) | (packed.pattern == "dense")  # the others skip this zero
    for kernel in kernels(packed):
        for bad in (torch.nan, torch.inf, -torch.inf):
            x = random(5, 100, seed=2)
            clean = call(packed, x, kernel=kernel)
            x[2, 99] = bad
            y = call(packed, x, kernel=kernel)
            assert torch.equal(torch.isfinite(y[2]), ~used)
            assert torch.equal(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("values", LIMIT)
def test_layout_of_dense(values: str) -> None:
    """The bytes, read as docs/format.md says."""
    packed = zs.pack(random(20, 100), "dense", values, 32)
    raw = packed.blob.numpy().tobytes()
    (at, length), (scales_at, _) = struct.iter_unpack("<QQ", raw[64:96])
    for row in range(20):
        for column in range(100):
            quad, lane = column // 4, row % 16 * 4 + column % 4
            if values == "int8":
                code = raw[at + row // 16 * 128 * 16 + quad * 64 + lane] - 128
            else:
                code = (raw[at + row // 16 * 64 * 16 + quad // 2 * 64 + lane] >> quad % 2 * 4 & 15) - 8
            assert packed.codes is not None and code == packed.codes[row, column]
        for group in range(4):
            (scale,) = struct.unpack_from("<e", raw, scales_at + ((row // 16 * 4 + group) * 16 + row % 16) * 2)
            assert packed.scales is not None and scale == packed.scales[row, group]
    assert length == 2 * 128 * 16 // (2 if values == "int4" else 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": 48}, "one scale serves 32, 64 or 128"),
        ({"group_size": "64"}, "group_size is '64'"),
        ({"scales": "bf16"}, "give a tensor or one of"),
        ({"scales": torch.ones(8)}, r"shape \[8\], expected \[8, 2\]: rows, and groups of 64"),
        ({"scales": torch.ones(8, 1)}, r"expected \[8, 2\]"),
        ({"scales": torch.ones(8, 2, dtype=torch.float64)}, "torch.float64"),
        ({"scales": torch.ones(8, 2, dtype=torch.int32)}, "torch.int32"),
        ({"scales": torch.zeros(8, 2)}, "zero, negative or not finite"),
        ({"scales": -torch.ones(8, 2)}, "zero, negative or not finite"),
        ({"scales": torch.full((8, 2), torch.inf)}, "zero, negative or not finite"),
        ({"scales": torch.full((8, 2), torch.nan)}, "zero, negative or not finite"),
        ({"weight": torch.full((8, 100), 1e9)}, "use scales='fp32'"),
        ({"weight": torch.full((8, 100), 1e-7)}, "too small for fp16 scales: use scales='fp32'"),
        ({"scales": torch.full((8, 2), 0.01)}, "row 0, group 0: weight 1 lies beyond the int4 codes of its scale 0.01"),
        ({"format": ["dense"]}, r"unknown format \['dense'\]"),
        ({"group_size": 64.0}, r"group_size is 64\.0"),
        ({"scales": ["fp16"]}, r"scales is \['fp16'\]: give a tensor"),
        ({"values": "bf16", "scales": torch.ones(8, 2)}, "scales belongs to integer values"),
    ],
    ids=str,
)
def test_pack_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(zs.ZeroskipError, match=message) as caught:
        zs.pack(**{"weight": torch.ones(8, 100), "format": "dense", "values": "int4", **arguments})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", LIMIT)
def test_scales_may_clip(values: str) -> None:
    weight = random(8, 64)
    scales = 0.8 * weight.abs().amax(1, keepdim=True) / LIMIT[values]
    packed = zs.pack(weight, "dense", values, scales=scales, group_size=64)
    assert packed.codes is not None
    assert {int(packed.codes.min()), int(packed.codes.max())} & {LEAST[values], LIMIT[values]}


@pytest.mark.parametrize("values", LIMIT)
def test_a_small_group_among_others_keeps_fp16_scales(values: str) -> None:
    weight = random(128, 65) * 0.02  # the last group of a row is one weight, as small as any
    weight[5, 64], weight[6, 64] = 1e-9, -3e-7
    packed = zs.pack(weight, "dense", values)
    assert packed.scales is not None and packed.scales.dtype == torch.float16 and bool((packed.scales > 0).all())
    assert ((zs.unpack(packed) - weight).abs() <= spread(packed.scales, 64, 65) * 0.5001).all()


@pytest.mark.parametrize("size", [1e-7, 1e9])
@pytest.mark.parametrize("values", LIMIT)
def test_no_weight_is_too_small_or_large_for_pruning_and_compilation(values: str, size: float) -> None:
    weight = random(64, 64) * size
    packed = pack_as("dense", weight, values, None)
    solved = group_scales(weight, torch.ones(64), Integers(values, 64))
    assert packed.scales is not None and packed.scales.dtype == solved.dtype == torch.float32
    for scales in (packed.scales, solved):
        lost = (codes_of(weight, scales, values, 64) * scales - weight).norm() / weight.norm()
        assert lost < (0.01 if values == "int8" else 0.15)


@each_kind
def test_headers_that_lie_are_refused(name: str, values: str) -> None:
    original = zs.pack(random(18, 96), name, values).blob

    def refuse(offset: int, raw: bytes, message: str) -> None:
        blob = original.clone()
        blob[offset : offset + len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.int8)
        digest = _core.hash_blob(blob.data_ptr(), blob.numel())
        blob[40:48] = torch.frombuffer(bytearray(struct.pack("<Q", digest)), dtype=torch.int8)
        with pytest.raises(zs.ZeroskipError, match=message) as caught:
            zs.Packed.from_blob(blob)
        assert "\n" not in str(caught.value)

    for size in (0, 1, 31, 48, 256, 0xFFFF):
        refuse(60, struct.pack("<H", size), f"impossible group size {size}")
    refuse(60, struct.pack("<H", 32), "section")
    for scales in (0, 2, 4, 255):
        refuse(62, bytes([scales]), f"unknown type of scales {scales}")
    refuse(50, bytes([1]), "impossible group size 64")
    refuse(50, bytes([5]), "unknown value type 5")


@pytest.mark.parametrize("kind", SCALES)
def test_scales_of_dense_are_checked(kind: str) -> None:
    original = zs.pack(random(18, 96), "dense", "int4", scales=kind).blob
    at = struct.unpack_from("<Q", original.numpy().tobytes(), 80)[0]
    code = "<e" if kind == "fp16" else "<f"
    size = struct.calcsize(code)
    cases = [(0, bad, "zero, negative or not finite") for bad in (0.0, -1.0, -0.0, float("inf"), float("nan"))]
    cases += [(2 * 16 + 15 + 16, 1.0, "does not exist")]  # the last row of the second panel
    for index, bad, message in cases:
        blob = original.clone()
        start = at + index * size
        blob[start : start + size] = torch.frombuffer(bytearray(struct.pack(code, bad)), dtype=torch.int8)
        digest = _core.hash_blob(blob.data_ptr(), blob.numel())
        blob[40:48] = torch.frombuffer(bytearray(struct.pack("<Q", digest)), dtype=torch.int8)
        with pytest.raises(zs.ZeroskipError, match=message):
            zs.Packed.from_blob(blob)


def test_other_values_have_no_groups() -> None:
    packed = zs.pack(random(4, 4), "dense")
    assert packed.group_size is None and packed.codes is None and packed.scales is None


def test_ragged_groups_are_padded_with_nothing() -> None:
    weight = random(5, 70)
    made = quantize(weight, "int8", 64)
    alone = quantize(pad(weight[:, 64:], (0, 26)), "int8", 32)
    assert torch.equal(made.codes[:, 64:], alone.codes[:, :6]) and torch.equal(made.scales[:, 1:], alone.scales)


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_group_of_a_rounded_weight_is_found_and_of_another_it_is_not(values, dtype):
    torch.manual_seed(0)
    for group_size in GROUPS:
        quantized = quantize(torch.randn(8, 320), values, group_size)
        weight = quantized.dequantize().to(dtype)
        assert group_of(weight, quantized.scales, values) == group_size
        assert torch.equal(quantize(weight, values, group_size, quantized.scales).codes, quantized.codes)
        assert group_of(torch.randn(8, 320), quantized.scales, values) is None
        assert group_of(weight, quantized.scales[:, :-1], values) is None
    wide = quantize(torch.randn(8, 320), "int8", 64)
    assert group_of(wide.dequantize(), wide.scales, "int4") is None
