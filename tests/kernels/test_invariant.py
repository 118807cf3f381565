"""Which kernels give a row the same bits whatever else is in the batch, and that threads do not matter to any."""

from __future__ import annotations

import pytest
import torch
from oracle import Case, cases, example, holds, random

import zeroskip as zs
from zeroskip import ops
from zeroskip.planning.rows import steady_kernels

each_kernel = pytest.mark.parametrize("case", cases(), ids=[case[2] for case in cases()])
HOLD = {"dense", "strip_nm"}  # formats whose kernels on these rows are written to hold
PLAIN_ROWS = ("scalar", "avx2")


@pytest.mark.kernels
@each_kernel
def test_what_trying_finds_holds_for_other_values_too(case: Case) -> None:
    name, values, kernel = case
    m, k = 70, 320
    packed = zs.pack(example(name, m, k, values), name, values)
    found = steady_kernels(packed, torch.float32, [kernel])
    if name in HOLD and kernel.endswith(PLAIN_ROWS):
        assert found == (kernel,)
    # What bf16 hides is no steadiness: the sums themselves are looked at.
    assert set(steady_kernels(packed, torch.bfloat16, [kernel])) <= set(found) or kernel.endswith(("bf16", "amx"))
    if found:
        other = zs.pack(example(name, m, k, values, seed=1), name, values)
        assert holds(lambda x: ops.run(other, x, kernel=kernel), random(60, k, seed=2))
    elif kernel.endswith(PLAIN_ROWS):
        assert not holds(lambda x: ops.run(packed, x, kernel=kernel), random(60, k, seed=2))


@pytest.mark.kernels
@each_kernel
def test_one_and_two_threads_give_the_same_bits(case: Case) -> None:
    name, values, kernel = case
    packed = zs.pack(example(name, 290, 576, values), name, values)
    for tokens in (1, 2, 9, 70):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = random(tokens, 576, seed=tokens, dtype=dtype)
            torch.set_num_threads(1)
            one = ops.run(packed, x, kernel=kernel)
            torch.set_num_threads(2)
            assert torch.equal(ops.run(packed, x, kernel=kernel), one), (tokens, dtype)


@pytest.mark.kernels
@each_kernel
def test_a_row_that_is_multiplied_in_stretches_has_the_bits_of_a_whole_one(case: Case) -> None:
    name, values, kernel = case
    if name not in HOLD or not kernel.endswith(PLAIN_ROWS):
        pytest.skip("multiplies no row in stretches")
    packed = zs.pack(example(name, 66, 4032, values), name, values)
    x = random(90, 4032, seed=3)
    together = ops.run(packed, x, kernel=kernel)
    for first, last in ((0, 1), (29, 30), (84, 90), (60, 80)):
        assert torch.equal(ops.run(packed, x[first:last].contiguous(), kernel=kernel), together[first:last])
