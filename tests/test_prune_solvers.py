"""What must hold of every method that moves weights, on one layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import error, layer, optimum, problem

from zeroskip.prune import Method, Pattern
from zeroskip.prune.admm import RIDGE as ADMM_RIDGE
from zeroskip.prune.admm import split
from zeroskip.prune.composition import Composition
from zeroskip.prune.numerics import cholesky, inverse, inverse_factor, unit_gram
from zeroskip.prune.sparsegpt import RIDGE, sweep

MOVING = [
    name
    for name, kind in Method.known.items()
    if kind.run is not Method.run and "gram" in kind.needs and not kind.quantizes
]
PATTERNS = ["unstructured", "2:4", "4:8@7", "block:4x2", "block:1x4", "block:3x1"]


def cells():
    return [(m, p) for m in MOVING for p in PATTERNS if Method.known[m]().serves(Pattern.parse(p))]


@pytest.mark.parametrize(("method", "pattern"), cells())
@settings(max_examples=4, deadline=None)
@given(st.integers(0, 99), st.sampled_from([0.0, 0.13, 0.5, 0.9]), st.sampled_from([0, 3]))
def test_counts_zeros_and_the_best_answer_on_the_same_support(method, pattern, seed, sparsity, dead):
    w, x = layer(seed, dead=dead)
    task = problem(w, x, pattern, sparsity)
    asked = task.sparsity
    solution = Composition.parse(method).run(task)[0]
    off = ~solution.keep
    units = {"block:4x2": 8, "block:1x4": 4, "block:3x1": 3}.get(pattern, 1)
    assert int(off.sum()) == units * round(w.numel() / units * asked)
    assert (solution.weight[off] == 0).all() and torch.isfinite(solution.weight).all()
    assert torch.equal(task.pattern.select(solution.keep.float(), asked), solution.keep)  # it has the pattern
    if asked == 0:
        assert torch.equal(solution.weight, w)
    elif not dead:
        best = error(w, optimum(w, solution.keep, x), x)
        assert best <= error(w, solution.weight, x) + 1e-9
        if method != "sparsegpt" or asked <= 0.5:  # a sweep that finds few columns left to its right may lose
            assert error(w, solution.weight, x) < error(w, w.masked_fill(off, 0.0), x) + 1e-9


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.sampled_from(PATTERNS), st.sampled_from([0.3, 0.7]))
def test_the_loss_that_sparsegpt_sums_up_is_that_of_its_weights(seed, pattern, sparsity):
    w, x = layer(seed, columns=160)  # more than one block of columns
    task = problem(w, x, pattern, sparsity)
    unit, scale = unit_gram(task.stats["gram"])
    upper, _ = inverse_factor(unit, RIDGE, "layer")
    _, weight, loss = sweep(w * scale, upper, task.pattern, task.sparsity)
    change = (w * scale - weight).double()
    h = unit.double() + RIDGE * torch.eye(len(unit), dtype=torch.float64)
    assert loss == pytest.approx(float(((change @ h) * change).sum()), rel=1e-4)


def test_sparsegpt_on_a_given_support_is_its_sweep_on_that_support():
    w, x = layer(3)
    task = problem(w, x, "2:4")
    unit, scale = unit_gram(task.stats["gram"])
    upper, _ = inverse_factor(unit, RIDGE, "layer")
    keep, weight, loss = sweep(w * scale, upper, task.pattern, 0.5)
    again = sweep(w * scale, upper, keep, 0.5)
    assert torch.equal(keep, again[0]) and torch.equal(weight, again[1]) and loss == again[2]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "8:16@8", "block:4x2"])
def test_admm_settles_on_its_support_as_it_goes_on(pattern):
    """With the support fixed by its first 15 steps, more steps bring the weights nearer to the best ones there."""
    for seed in range(4):
        w, x = layer(seed, 32, 64, 400)
        task = problem(w, x, pattern, 0.5)
        unit, scale = unit_gram(task.stats["gram"])
        h = unit.double() + ADMM_RIDGE * torch.eye(64, dtype=torch.float64)

        def loss(v, w=w, scale=scale, h=h):
            change = ((w - v) * scale).double()
            return float(((change @ h) * change).sum())

        gaps = []
        for steps in (20, 40, 200):
            keep, weight, _ = split(w * scale, unit, task, steps)
            gaps.append(loss(weight / scale) / loss(optimum(w, keep, x, ADMM_RIDGE)))
        assert 1 - 1e-5 < gaps[2] < min(gaps[0], 1.02)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_factors_are_what_they_say(k):
    x = torch.randn(3 * k, k, generator=torch.Generator().manual_seed(k))
    unit, scale = unit_gram(x.t() @ x)
    assert torch.allclose(unit.diagonal(), torch.ones(k)) and torch.allclose(scale, x.norm(dim=0))
    h = unit.double() + 0.01 * torch.eye(k, dtype=torch.float64)
    upper, notes = inverse_factor(unit, 0.01, "layer")
    assert not notes and torch.equal(upper, upper.triu())
    torch.testing.assert_close(
        upper.double().t() @ upper.double() @ h, torch.eye(k, dtype=torch.float64), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        inverse(unit, 0.01, "layer")[0].double() @ h, torch.eye(k, dtype=torch.float64), atol=1e-4, rtol=0
    )


def test_a_matrix_that_is_not_positive_gets_ten_times_the_ridge_and_a_note(caplog):
    matrix = torch.eye(6, dtype=torch.float64)
    matrix[0, 1] = matrix[1, 0] = 1.05
    factor, notes = cholesky(matrix, 0.01, "layers.3.up")
    assert notes == ["ridge raised from 0.01 to 0.1: Cholesky failed"] and "layers.3.up: ridge raised" in caplog.text
    torch.testing.assert_close(factor @ factor.t(), matrix + 0.1 * torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("method", MOVING)
def test_more_inputs_than_tokens_and_equal_inputs_break_nothing(method):
    w, x = layer(1, tokens=10)
    x[:, 5] = x[:, 6]
    solution = Composition.parse(f"{method}+ls").run(problem(w, x, "2:4"))[1]
    assert torch.isfinite(solution.weight).all() and (solution.keep.view(24, 8, 4).sum(2) == 2).all()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.sampled_from(["unstructured", "2:4", "4:8"]))
def test_dsnot_brings_the_mean_output_back_and_keeps_the_counts(seed, pattern):
    w, x = layer(seed)
    x = x + torch.randn(32, generator=torch.Generator().manual_seed(seed)) * x.std(0)  # the mean must not vanish
    task = problem(w, x, pattern, tokens=len(x))
    swapped, wanda = (Composition.parse(name).run(task)[0].keep for name in ("dsnot", "wanda"))
    assert torch.equal(swapped.sum(1), wanda.sum(1))
    pull = w * x.mean(0)
    before, after = ((pull * ~keep).sum(1).abs() for keep in (wanda, swapped))
    assert (after <= before + 1e-5).all() and after.sum() < 0.9 * before.sum()
