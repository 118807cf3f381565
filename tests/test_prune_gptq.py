"""GPTQ, alone and joint with SparseGPT: zeros stay, codes come back, errors go down."""

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import error, layer, problem
from tiny_models import batches, llama

import zeroskip
from zeroskip.errors import ZeroskipError
from zeroskip.model import find_sites
from zeroskip.prune.base import Integers
from zeroskip.prune.composition import Composition, methods
from zeroskip.prune.descent import descend
from zeroskip.prune.scales import group_scales, spread
from zeroskip.prune.sparsegpt import RIDGE
from zeroskip.quantize import LEAST, LIMIT, quantize

HEADS = ("gptq", "sparsegpt+gptq", "admm+gptq", "alps+gptq")
TAILS = ("", "+ls", "+cd", "+cd+ls")
INTEGERS = [Integers("int4", 32), Integers("int8", 64), Integers("int4", 128)]


def run(method, w, x, pattern="unstructured", integers=INTEGERS[0]):
    return Composition.parse(method).run(problem(w, x, pattern, integers=integers))[1]


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 99),
    st.sampled_from([*(head + tail for head in HEADS for tail in TAILS), "rtn"]),
    st.sampled_from(INTEGERS),
    st.sampled_from([32, 80]),
    st.sampled_from([0, 5]),
)
def test_weights_are_codes_times_scales_and_packing_finds_the_same_codes(seed, method, integers, columns, dead):
    w, x = layer(seed, columns=columns, dead=dead)
    w[torch.rand(w.shape, generator=torch.Generator().manual_seed(seed)) < 0.5] = 0.0
    zeros = w == 0
    solution = run(method, w, x, integers=integers)
    packed = zeroskip.pack(
        solution.weight, "dense", values=integers.values, group_size=integers.group_size, scales=solution.scales
    )
    assert torch.equal(zeroskip.unpack(packed), solution.weight)
    codes = solution.weight / solution.scales.float().repeat_interleave(integers.group_size, 1)[:, :columns]
    assert torch.equal(codes.round() * (codes / codes.round()).nan_to_num(1.0).round(), codes.round())
    assert codes.min() > LEAST[integers.values] - 0.01 and codes.max() < LIMIT[integers.values] + 0.01
    if method.startswith(("gptq", "rtn")):
        assert (solution.weight[zeros] == 0).all()
    assert (solution.weight[~solution.keep] == 0).all()


@pytest.mark.parametrize("integers", INTEGERS)
def test_it_rounds_better_than_rounding(integers):
    for seed in range(3):
        w, x = layer(seed, columns=128, tokens=600)
        plain = error(w, quantize(w, integers.values, integers.group_size).dequantize(), x)
        swept, refitted = (error(w, run(method, w, x, integers=integers).weight, x) for method in ("gptq", "gptq+ls"))
        assert swept < 0.5 * plain and refitted < swept


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8@8", "block:4x2"])
def test_one_sweep_is_better_than_two_steps_apart(pattern):
    """Prune without making up for it, then round with GPTQ, against both at once; and int8 rounds hardly at all."""
    eight = plain = 0.0
    for seed in range(3):
        w, x = layer(seed, columns=64, tokens=400)
        joint = run("sparsegpt+gptq", w, x, pattern)
        apart = run("gptq", run("wanda", w, x, pattern).weight, x)
        assert error(w, joint.weight, x) < error(w, apart.weight, x)
        assert torch.equal(joint.keep, problem(w, x, pattern).pattern.select(joint.keep.float(), 0.5))
        eight += error(w, run("sparsegpt+gptq", w, x, pattern, Integers("int8", 64)).weight, x)
        plain += error(w, run("sparsegpt", w, x, pattern).weight, x)
    assert eight < 1.3 * plain  # a weight that rounds otherwise can turn the choice of the columns after it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_keeps_its_zeros_and_its_scales(dtype):
    model, given = llama(dtype, layers=2), batches("llama", 2)
    zeroskip.prune(model, "wanda+ls", pattern="2:4", calibration=given)
    zeros = {site.name: site.weight() == 0 for site in find_sites(model)}
    report = zeroskip.prune(model, "gptq", calibration=given, values="int4", group_size=32)
    assert report.recipe["values"] == "int4" and report.recipe["group_size"] == 32
    for site, row in zip(find_sites(model), report.rows, strict=True):
        assert (site.weight()[zeros[site.name]] == 0).all() and row.sparsity_asked == 0.5 <= row.sparsity
        scales, weight = site.scales[0], site.weight()[0]
        packed = zeroskip.pack(weight, "dense", values="int4", group_size=32, scales=scales)
        assert torch.equal(zeroskip.unpack(packed).to(dtype), weight)
    twin = copy.deepcopy(model).half()
    assert all(torch.equal(a.scales, b.scales) for a, b in zip(find_sites(model), find_sites(twin), strict=True))
    zeroskip.prune(model, "magnitude", sparsity=0.6)
    assert all(site.scales is None for site in find_sites(model))  # they are no longer true of the weights


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 999),
    st.sampled_from(INTEGERS),
    st.sampled_from([1, 7, 31]),
    st.sampled_from([5, 33, 130, 200]),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_descent_never_moves_a_zero_and_never_loses(seed, integers, rows, columns, zeros):
    w, x = layer(seed, rows=rows, columns=columns, tokens=60)
    draw = torch.Generator().manual_seed(seed)
    keep = torch.rand(w.shape, generator=draw) >= zeros
    scales = group_scales(w, torch.ones(columns), integers)
    step = spread(scales, integers, columns)
    begun = torch.where(keep, (w / step).round().clamp_(LEAST[integers.values], LIMIT[integers.values]) * step, 0.0)
    gram = x.t() @ x
    found = descend(w, begun, step, keep, gram, integers.values)
    codes = (found / step).round()
    assert torch.equal(codes * step, found) and (found[~keep] == 0).all()
    assert codes.min() >= LEAST[integers.values] and codes.max() <= LIMIT[integers.values]
    metric = gram.double() + RIDGE * gram.double().diagonal().diag()

    def loss(v):
        change = w.double() - v.double()
        return ((change @ metric) * change).sum(1)

    assert (loss(found) <= loss(begun) * (1 + 1e-5) + 1e-9).all(), "row by row"
    # Where it has settled, no single code of any row can be better.
    again = descend(w, found, step, keep, gram, integers.values)
    assert (loss(again) <= loss(found) * (1 + 1e-5) + 1e-9).all()


def test_descent_finds_what_a_search_over_all_codes_finds_for_one_weight_at_a_time():
    """When nothing changes any more, each kept code is the best of all, the others of its row as they are."""
    integers = Integers("int4", 32)
    w, x = layer(5, rows=6, columns=24, tokens=80)
    keep = torch.rand(w.shape, generator=torch.Generator().manual_seed(5)) >= 0.4
    step = spread(group_scales(w, torch.ones(24), integers), integers, 24)
    gram, found = x.t() @ x, torch.zeros_like(w)
    for _ in range(20):
        found = descend(w, found, step, keep, gram, "int4")
    metric = gram.double() + RIDGE * gram.double().diagonal().diag()
    for row, column in keep.nonzero().tolist():
        losses = []
        for code in range(LEAST["int4"], LIMIT["int4"] + 1):
            change = (w[row] - found[row]).double()
            change[column] = w[row, column].double() - code * step[row, column].double()
            losses.append(float(change @ metric @ change))
        here = round(float(found[row, column] / step[row, column])) - LEAST["int4"]
        assert losses[here] <= min(losses) * (1 + 1e-4) + 1e-9


def test_descent_makes_up_for_more_than_a_sweep():
    for seed in range(3):
        w, x = layer(seed, columns=128, tokens=600)
        for head in ("gptq", "sparsegpt+gptq"):
            assert error(w, run(f"{head}+cd", w, x).weight, x) < error(w, run(head, w, x).weight, x)
        assert error(w, run("alps+gptq+cd", w, x).weight, x) < error(w, run("sparsegpt+gptq", w, x).weight, x)


def test_descent_needs_integers():
    with pytest.raises(ZeroskipError, match="'cd' moves integers, and 'wanda' makes none"):
        Composition.parse("wanda+cd")
    assert "gptq+cd" in methods() and "wanda+cd" not in methods()


@pytest.mark.parametrize("method", ["sparsegpt", "sparsegpt+gptq", "admm+gptq", "obs", "alps", "fista", "wanda+ls"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_inputs_too_far_apart_are_refused_or_counts_are_exact(method, pattern):
    """Sizes of inputs up to 1e34 apart: exact counts and finite weights, or one line that says why not."""
    w, x = layer(0, columns=64, tokens=200)
    for apart in (30, 34):
        sizes = (
            10.0
            ** torch.linspace(-apart / 2, apart / 2, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
        )
        try:
            found = run(method, w, x * sizes, pattern)
        except ZeroskipError as error:
            assert re.fullmatch(
                r"layer: the solve leaves the range of fp32.*factor of \de\+\d\d: .*'wanda'", str(error)
            )
        else:
            assert int((~found.keep).sum()) == w.numel() // 2
            assert torch.isfinite(found.weight).all()


def test_a_sweep_that_overflows_is_refused():
    w, x = layer(0, columns=64, tokens=200)
    sizes = 10.0 ** torch.linspace(-12, 18, 64)
    with pytest.raises(ZeroskipError, match="the solve leaves the range of fp32"):
        run("sparsegpt+gptq", w, x * sizes, "2:4")
