"""Attention of one query and the root-mean-square norm against float64, on ragged shapes and strange strides."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zeroskip.decode_ops import attend, attend_plain, can_attend, normalise
from zeroskip.errors import ZeroskipError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def oracle(q, k, v, mask, scale):
    per = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(per, 1), v.double().repeat_interleave(per, 1)
    scores = scale * (q @ k.transpose(2, 3))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = torch.nan_to_num(torch.softmax(scores, -1))
    # What rounding of a score, of a weight and of the sums may do, in units of the dtype's rounding.
    worst = 1 + (scale * (q.abs() @ k.abs().transpose(2, 3))).amax(-1, keepdim=True)
    return (weights @ v).transpose(1, 2), (worst * (weights @ v.abs())).transpose(1, 2)


def given_tensors(batch, groups, per, tokens, depth, width, dtype, seed=0, roomy=False):
    draw = torch.Generator().manual_seed(seed)

    def make(heads, count, length):
        x = torch.randn(batch, heads, count + 3 * roomy, length + 2 * roomy, generator=draw).to(dtype)
        return x[:, :, 1 : count + 1, 1 : length + 1] if roomy else x

    return make(groups * per, 1, depth), make(groups, tokens, depth), make(groups, tokens, width)


def assert_near(y, q, k, v, mask, scale):
    want, bound = oracle(q, k, v, mask, scale)
    assert y.dtype is q.dtype and y.is_contiguous() and y.shape == want.shape
    allowed = 4e-6 * bound + torch.finfo(q.dtype).eps * want.abs() + 1e-7
    assert bool(((y.double() - want).abs() <= allowed).all())


@given(
    batch=st.integers(1, 3), groups=st.integers(1, 3), per=st.integers(1, 7), tokens=st.integers(1, 150),
    depth=st.integers(1, 80), width=st.integers(1, 80), dtype=st.sampled_from(DTYPES), roomy=st.booleans(),
    masked=st.sampled_from(["", "one", "each"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_attention_of_any_shape(batch, groups, per, tokens, depth, width, dtype, roomy, masked, seed):
    q, k, v = given_tensors(batch, groups, per, tokens, depth, width, dtype, seed, roomy)
    mask = None
    if masked:
        count = batch if masked == "each" else 1
        mask = torch.rand(count, 1, 1, tokens, generator=torch.Generator().manual_seed(seed)) < 0.6
    scale = 0.3
    assert_near(attend(q, k, v, mask, scale), q, k, v, mask, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_on_every_row_of_instructions(row, dtype):
    for shape in ((1, 8, 4, 150, 64, 64), (2, 1, 3, 33, 80, 24), (1, 2, 1, 1, 5, 7)):
        q, k, v = given_tensors(*shape, dtype)
        assert_near(attend(q, k, v), q, k, v, None, 1 / math.sqrt(shape[4]))


def test_attention_reads_the_cache_in_place_and_alike_in_any_company():
    q, k, v = given_tensors(3, 2, 4, 70, 16, 16, torch.float32)
    room = torch.full((3, 2, 200, 16), math.nan)
    room[:, :, :70] = k
    whole = attend(q, k, v)
    assert torch.equal(attend(q, room[:, :, :70], v), whole)
    for place in range(3):
        assert torch.equal(attend(*(x[place : place + 1] for x in (q, k, v))), whole[place : place + 1])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        q, k, v = given_tensors(2, 3, 4, 500, 64, 64, torch.float32)
        two = attend(q, k, v)
        torch.set_num_threads(1)
        assert torch.equal(attend(q, k, v), two)
    finally:
        torch.set_num_threads(before)


def test_attention_of_large_scores_and_of_what_is_not_finite():
    q, k, v = given_tensors(1, 1, 4, 40, 32, 32, torch.float32)
    assert_near(attend(100 * q, 100 * k, v), 100 * q, 100 * k, v, None, 1 / math.sqrt(32))
    v[0, 0, 7] = math.inf
    assert bool(torch.isinf(attend(q, k, v)).all())
    q[0, 2] = math.nan
    assert torch.isnan(attend(q, k, v))[0, 0].all(-1).tolist() == [False, False, True, False]
    nothing = torch.zeros(1, 1, 1, 40, dtype=torch.bool)
    assert attend(*given_tensors(1, 1, 4, 40, 32, 32, torch.float32), nothing).abs().sum() == 0


def test_the_attention_op_is_traced_and_checked():
    q, k, v = given_tensors(2, 2, 2, 9, 8, 8, torch.float32)
    mask = torch.rand(2, 1, 1, 9) < 0.8
    torch.library.opcheck(torch.ops.zeroskip.attend.default, (q, k, v, mask, 0.5))
    torch.library.opcheck(torch.ops.zeroskip.normalise.default, (torch.randn(3, 8), torch.randn(8), 1e-5, 1.0))


def test_attention_refuses_what_does_not_fit():
    q, k, v = given_tensors(2, 2, 2, 9, 8, 8, torch.float32)
    wrong = [
        (q[0], k, v, None), (torch.cat([q, q], 2), k, v, None), (q[:, :3], k, v, None), (q, k[:1], v, None),
        (q, k, v[:, :, :5], None), (q, k[..., :5], v, None), (q, k.half(), v, None), (q.double(), k, v, None),
        (q, k[:, :, :0], v[:, :, :0], None), (q, k, v, torch.ones(2, 1, 1, 9)),
        (q, k, v, torch.ones(2, 1, 1, 8, dtype=torch.bool)), (q, k, v, torch.ones(2, 4, 1, 9, dtype=torch.bool)),
    ]  # fmt: skip
    for given_ in wrong:
        assert not can_attend(*given_)
        with pytest.raises(ZeroskipError, match="one query a head"):
            attend_plain(*given_, 0.5)


@given(
    shape=st.sampled_from([(1, 1), (3, 7), (2, 1, 64), (5, 100), (1, 1, 2048), (0, 4), (40, 1031)]),
    dtype=st.sampled_from(DTYPES), wide=st.booleans(), offset=st.sampled_from([0.0, 1.0]),
    scale=st.sampled_from([1.0, 1e-4, 1e4]),
)  # fmt: skip
def test_the_norm_of_any_shape(shape, dtype, wide, offset, scale):
    draw = torch.Generator().manual_seed(sum(shape))
    x = (scale * torch.randn(*shape, generator=draw)).to(dtype)
    weight = torch.randn(shape[-1], generator=draw).to(torch.float32 if wide else dtype)
    y = normalise(x, weight, 1e-5, offset)
    mean = (x.double() ** 2).mean(-1, keepdim=True)
    want = x.double() / (mean + 1e-5).sqrt() * (weight.double() + offset)
    allowed = (2e-6 + torch.finfo(dtype).eps) * want.abs() + torch.finfo(dtype).smallest_normal
    assert y.dtype is dtype and y.shape == x.shape
    assert bool(((y.double() - want).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_on_every_row_of_instructions(row, dtype):
    x, weight = torch.randn(3, 77).to(dtype), torch.randn(77).to(dtype)
    want = x.double() / ((x.double() ** 2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    got = normalise(x.t().contiguous().t(), weight, 1e-6)
    assert bool(((got.double() - want).abs() <= (2e-6 + torch.finfo(dtype).eps) * want.abs()).all())


def test_the_norm_refuses_what_does_not_fit():
    for x, weight in ((torch.randn(2, 3), torch.randn(4)), (torch.randn(2, 3).double(), torch.randn(3))):
        with pytest.raises(ZeroskipError, match="normalise takes"):
            normalise(x, weight, 1e-5)
