"""Every kernel that can run here against the float64 oracle. Rows come from the registry (tests/oracle.py)."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch
from oracle import Case, call, cases, example, examples, expect, random, stored, verify

import zeroskip as zs
from zeroskip.formats.base import get, names
from zeroskip.ops import ACTIVATIONS
from zeroskip.ops import kernels as kernels_of
from zeroskip.quantize import LIMIT

pytestmark = pytest.mark.kernels

each_kernel = pytest.mark.parametrize("case", cases(), ids=[case[2] for case in cases()])
# One short of a lane or a panel, exact, one over; one row, one column; odd ones.
SHAPES = [(1, 1), (1, 64), (64, 1), (1, 2), (15, 16), (16, 17), (17, 15), (16, 64), (31, 32), (33, 31), (37, 61),
          (63, 64), (64, 63), (65, 65), (63, 66), (66, 80), (130, 192)]  # fmt: skip


def test_every_format_has_kernels_here() -> None:
    """On the scalar row already, in each value type."""
    served = {case[:2] for case in cases() if case[2].endswith("_scalar")}
    assert served == {(name, values) for name in names() for values in get(name).values}


@each_kernel
def test_ragged_shapes(case: Case) -> None:
    name, values, kernel = case
    tried = 0
    for m, k in SHAPES:
        bias = random(m, seed=3) if m % 2 else None
        for weight in examples(name, m, k, values, seed=m * 1000 + k):
            packed = zs.pack(weight, name, values)
            for tokens in (1, 2, 5):
                x = random(tokens, k, seed=tokens)
                verify(call(packed, x, bias, kernel=kernel), weight, x, bias, kernel=kernel)
                tried += 1
    assert tried > 20


@each_kernel
def test_token_counts(case: Case) -> None:
    name, values, kernel = case
    weight = example(name, 37, 96, values)
    packed = zs.pack(weight, name, values)
    x = random(200, 96, seed=1)
    for tokens in [*range(1, 19), 23, 24, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 200]:
        verify(call(packed, x[:tokens].clone(), kernel=kernel), weight, x[:tokens], kernel=kernel)


@each_kernel
def test_many_columns_and_tokens(case: Case) -> None:
    """Several steps of columns, several passes of tokens."""
    name, values, kernel = case
    for m, k, tokens in [(20, 1504, 400), (66, 4032, 90), (7, 20000, 3), (3, 20000, 70), (2, 70016, 6)]:
        weight = example(name, m, k, values)
        x = random(tokens, k, seed=2)
        verify(call(zs.pack(weight, name, values), x, kernel=kernel, threads=2), weight, x, kernel=kernel)


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_types_biases_activations(case: Case, dtype: torch.dtype) -> None:
    name, values, kernel = case
    for m, k in [(48, 64), (37, 30)]:
        weight = example(name, m, k, values, seed=4)
        packed = zs.pack(weight, name, values)
        for tokens in (1, 3, 21):
            x = random(tokens, k, seed=5, dtype=dtype) * 0.3
            for bias in (None, random(m, seed=6), random(m, seed=6, dtype=torch.bfloat16)):
                for activation in ACTIVATIONS:
                    y = call(packed, x, bias, activation, kernel)
                    verify(y, weight, x, bias, activation, kernel)


@each_kernel
def test_activations_at_the_ends(case: Case) -> None:
    """Large sums of either sign neither overflow inside an activation nor lose their sign."""
    name, values, kernel = case
    weight = example(name, 16, 64, values, seed=8)
    x = random(2, 64, seed=9) * 30
    packed = zs.pack(weight, name, values)
    for activation in ACTIVATIONS:
        verify(call(packed, x, None, activation, kernel), weight, x, None, activation, kernel)


@each_kernel
def test_small_integers_are_exact(case: Case) -> None:
    name, values, kernel = case
    ones = {"scales": torch.ones(50, 2)} if values in LIMIT else {}
    for weight in examples(name, 50, 128, values, integers=True):
        packed = zs.pack(weight, name, values, **ones)
        for tokens in (1, 4, 33):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                x = torch.randint(-4, 5, (tokens, 128), generator=torch.Generator().manual_seed(tokens)).to(dtype)
                x[:, ::32] = 127  # the largest byte: activations that are rounded to bytes stay as they are
                bias = torch.arange(50.0) - 25
                for activation in ("none", "relu"):
                    y = call(packed, x, bias, activation, kernel)
                    assert torch.equal(y, expect(weight, x, bias, activation)[0].to(dtype)), (tokens, dtype)


@each_kernel
def test_threads_do_not_matter(case: Case) -> None:
    name, values, kernel = case
    weight = example(name, 150, 160, values)
    packed = zs.pack(weight, name, values)
    for tokens in (1, 7, 100):
        x = random(tokens, 160, seed=tokens)
        one = call(packed, x, kernel=kernel, threads=1)
        for threads in (2, 3):
            assert torch.equal(one, call(packed, x, kernel=kernel, threads=threads))


@each_kernel
def test_an_empty_matrix_gives_the_bias(case: Case) -> None:
    name, values, kernel = case
    weight = torch.zeros(33, 64)
    packed = zs.pack(weight, name, values)
    assert packed.nnz == 0 and packed.sparsity == 1.0
    for tokens in (1, 20):
        x = random(tokens, 64)
        bias = random(33, seed=1)
        assert torch.equal(call(packed, x, bias, kernel=kernel), bias.expand(tokens, 33))
        assert (call(packed, x, kernel=kernel).view(torch.int32) == 0).all()  # +0.0


@each_kernel
def test_a_skipped_weight_contributes_nothing(case: Case) -> None:
    """Also where x is Inf or NaN, in the columns that no row keeps. `dense` skips nothing."""
    name, values, kernel = case
    weight = random(40, 128, seed=2)
    weight[:, ::2] = 0
    weight = stored(weight, values)
    packed = zs.pack(weight, name, values)
    if packed.pattern == "dense":
        pytest.skip("stores every weight")
    for tokens in (1, 2, 3, 4, 5, 8, 9, 16, 30, 40):
        x = random(tokens, 128, seed=tokens)
        finite = call(packed, x, kernel=kernel)
        x[:, ::2] = 0
        clean = call(packed, x, kernel=kernel)
        if values not in LIMIT:  # rounded to bytes, the others move with the largest of their group
            assert torch.equal(clean, finite)
        for poison in (torch.inf, -torch.inf, torch.nan):
            x[:, ::2] = poison
            assert torch.equal(call(packed, x, kernel=kernel), clean), (tokens, poison)


@each_kernel
def test_unstructured_skips_every_zero(case: Case) -> None:
    """A poisoned column spoils the rows that use it and leaves the others as they were."""
    name, values, kernel = case
    weight = next(iter(examples("csr", 37, 45, values, seed=2)))
    packed = zs.pack(weight, name, values) if get(name).accepts(weight) is None else None
    if packed is None or packed.pattern != "unstructured":
        pytest.skip("skips by its pattern")
    for tokens in (1, 2, 3, 4, 5, 8, 9, 16, 30, 40):
        x = random(tokens, 45, seed=tokens)
        for column in (0, 7, 8, 31, 32, 44):
            poisoned = x.clone()
            poisoned[tokens // 2, column] = 0
            expected = call(packed, poisoned, kernel=kernel)
            poisoned[tokens // 2, column] = torch.nan
            expected[tokens // 2, weight[:, column] != 0] = torch.nan
            torch.testing.assert_close(call(packed, poisoned, kernel=kernel), expected, rtol=0, atol=0, equal_nan=True)


@each_kernel
def test_subnormals_and_extremes(case: Case) -> None:
    name, values, kernel = case
    weight = example(name, 32, 64, values)
    for scale in (1e-39, 1e-20, 1e20):
        packed = zs.pack((weight.float() * scale).to(weight.dtype), name, values, scales="fp32")
        x = random(3, 64) * min(1.0, 1 / scale)
        verify(call(packed, x, kernel=kernel), zs.unpack(packed), x, kernel=kernel)


@each_kernel
def test_reads_stay_inside(case: Case) -> None:
    """x and the blob end where a page ends that may not be read: a load beyond would kill the process."""
    name, values, kernel = case
    for m, k in [(5, 22), (16, 64), (33, 48)]:
        for weight in examples(name, m, k, values):
            packed = zs.pack(weight, name, values)
            blob = _before_a_wall(packed.blob)
            walled = zs.Packed.from_blob(blob)
            for tokens, dtype in [(1, torch.float32), (3, torch.bfloat16), (9, torch.float16), (18, torch.float32)]:
                x = random(tokens, k, dtype=dtype)
                y = call(walled, _before_a_wall(x), kernel=kernel)
                assert torch.equal(y, call(packed, x, kernel=kernel))


def _before_a_wall(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose last byte is the last one before a page without access."""
    nbytes = tensor.numel() * tensor.element_size()
    pages = -(-nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    raw = torch.frombuffer(memory, dtype=torch.uint8)
    wall = ctypes.c_void_p(raw.data_ptr() + pages * mmap.PAGESIZE)
    if ctypes.CDLL(None, use_errno=True).mprotect(wall, mmap.PAGESIZE, 0):
        pytest.skip("mprotect is not allowed here")
    start = pages * mmap.PAGESIZE - nbytes
    copy = raw[start : start + nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


@pytest.mark.parametrize("kind", sorted({case[:2] for case in cases()}), ids="-".join)
def test_kernels_agree(kind: tuple[str, str]) -> None:
    """All rows give the same numbers within the bound, here the sum of two."""
    name, values = kind
    kernels = [case[2] for case in cases() if case[:2] == kind]
    weight = example(name, 70, 128, values, seed=7)
    packed = zs.pack(weight, name, values)
    assert set(kernels) == set(kernels_of(packed))
    for tokens in (1, 40):
        x = random(tokens, 128, seed=tokens)
        first = call(packed, x, kernel=kernels[0])
        for kernel in kernels[1:]:
            bound = expect(weight, x, kernel=kernel)[1] + expect(weight, x, kernel=kernels[0])[1]
            assert ((call(packed, x, kernel=kernel) - first).double().abs() <= bound).all(), kernel
