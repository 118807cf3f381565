"""Rotary positions, sums and products against float64 and, bit by bit, against torch's single calls."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zeroskip import _core

DTYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def turned_by(x, cos, sin):
    """What transformers does to heads [batch, heads, depth]; cos and sin [batch or 1, turned]."""
    width = cos.shape[-1]
    part, rest = x[..., :width], x[..., width:]
    half = torch.cat([-part[..., width // 2 :], part[..., : width // 2]], -1)
    return torch.cat([part * cos[:, None] + half * sin[:, None], rest], -1)


def rotate(batch, heads, groups, depth, width, turned, dtype, shared, seed=0):
    """Return what is given and what comes out; keys and values go to the third token of five."""
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, n, w, generator=draw).to(dtype)
        for n, w in ((heads, depth), (groups, depth), (groups, width))
    )
    cos, sin = (torch.randn(1 if shared else batch, turned, generator=draw).to(dtype) for _ in range(2))
    keys, values = (torch.full((batch, groups, 5, w), 7.0).to(dtype) for w in (depth, width))
    got = q.clone()
    by, of = keys.stride(), values.stride()
    _core.rotate(
        got.data_ptr(), k.data_ptr(), v.data_ptr(), cos.data_ptr(), sin.data_ptr(), keys[:, :, 2].data_ptr(),
        values[:, :, 2].data_ptr(), DTYPES[dtype],
        [batch, heads, groups, depth, width, turned, 0 if shared else turned, by[0], by[1], of[0], of[1]],
    )  # fmt: skip
    return (q, k, v, cos, sin), (got, keys, values)


def check(given_, got):
    q, k, v, cos, sin = given_
    turned, keys, values = got
    assert torch.equal(turned, turned_by(q, cos, sin))
    assert torch.equal(keys[:, :, 2], turned_by(k, cos, sin)) and torch.equal(values[:, :, 2], v)
    for around in (keys, values):
        assert bool((around[:, :, [0, 1, 3, 4]] == 7).all())
    want = turned_by(*(x.double() for x in (q, cos, sin)))
    size = turned_by(*(x.double().abs() for x in (q, cos, -sin))).abs() + want.abs()
    assert bool(((turned.double() - want).abs() <= 4 * torch.finfo(q.dtype).eps * size.clamp(min=1)).all())


@given(
    batch=st.integers(1, 3), heads=st.integers(1, 5), groups=st.integers(1, 3), half=st.integers(0, 40),
    rest=st.integers(0, 20), width=st.integers(1, 50), dtype=st.sampled_from(list(DTYPES)), shared=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_rotary_positions_of_any_shape(batch, heads, groups, half, rest, width, dtype, shared, seed):
    check(*rotate(batch, heads, groups, 2 * half + rest + (half + rest == 0), width, 2 * half, dtype, shared, seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_positions_on_every_row_of_instructions(row, dtype):
    for shape in ((2, 4, 2, 64, 64, 64), (1, 3, 1, 22, 7, 18), (3, 1, 1, 2, 1, 2)):
        for shared in (False, True):
            check(*rotate(*shape, dtype, shared))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 15, 16, 77, 4096, (1 << 16) + 35])
def test_sums_and_products_on_every_row_of_instructions(row, dtype, count):
    a, b = torch.randn(2, count, generator=torch.Generator().manual_seed(count)).to(dtype)
    for threads in (1, 2):
        for multiply, want in ((False, a + b), (True, a * b)):
            y = torch.full((count + 3,), 7.0).to(dtype)
            _core.combine(multiply, a.data_ptr(), b.data_ptr(), y.data_ptr(), DTYPES[dtype], count, threads)
            assert torch.equal(y[:count], want) and bool((y[count:] == 7).all())
    held = a.clone()
    _core.combine(True, held.data_ptr(), b.data_ptr(), held.data_ptr(), DTYPES[dtype], count, 1)
    assert torch.equal(held, a * b)


def test_numbers_that_are_not_finite_stay():
    a = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0] * 6)
    b = torch.tensor([1.0, -float("inf"), 0.0, float("nan")] * 6)
    y = torch.empty(24)
    for multiply, want in ((False, a + b), (True, a * b)):
        _core.combine(multiply, a.data_ptr(), b.data_ptr(), y.data_ptr(), 1, 24, 1)
        torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)


def test_what_does_not_fit_is_refused():
    for sizes in (
        [1, 1, 1, 4, 4, 3, 0, 4, 4, 4, 4],
        [1, 1, 1, 4, 4, 6, 0, 4, 4, 4, 4],
        [-1, 1, 1, 4, 4, 4, 0, 4, 4, 4, 4],
    ):
        with pytest.raises(ValueError, match="rotary positions of"):
            _core.rotate(0, 0, 0, 0, 0, 0, 0, 1, sizes)
    for wrong in ((0, [1] * 11), (4, [1] * 11), (1, [1] * 10)):
        with pytest.raises(ValueError, match="out of range"):
            _core.rotate(0, 0, 0, 0, 0, 0, 0, *wrong)
    for kind, count, threads in ((0, 1, 1), (4, 1, 1), (1, -1, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="out of range"):
            _core.combine(False, 0, 0, 0, kind, count, threads)
