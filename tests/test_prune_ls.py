"""Least squares: equal to a direct solve in float64, and never worse than anything else on its support."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeroskip.prune import Pattern, Problem
from zeroskip.prune.composition import Composition
from zeroskip.prune.ls import by_rows, by_strips


def layer(seed: int, rows: int = 24, columns: int = 32, tokens: int = 200, dead: int = 0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns // 4, generator=g) @ torch.randn(columns // 4, columns, generator=g)
    x = (x + 0.3 * torch.randn(tokens, columns, generator=g)) * torch.randn(columns, generator=g).exp()
    x[:, :dead] = 0
    return torch.randn(rows, columns, generator=g), x


def problem(w, x, pattern="unstructured", sparsity=0.5):
    stats = {"gram": x.t() @ x, "sumsq": x.square().sum(0)}
    return Problem("layer", w, Pattern.parse(pattern), sparsity, stats, torch.Generator().manual_seed(0))


def direct(w, keep, gram, ridge):
    """Row by row in float64, from the formula."""
    out = torch.zeros_like(w, dtype=torch.float64)
    gram = gram.double()
    for i, (row, on) in enumerate(zip(w.double(), keep, strict=True)):
        matrix = gram[on][:, on] + ridge * torch.diag(gram.diagonal()[on].clamp_min(1e-30))
        out[i, on] = row[on] + torch.linalg.solve(matrix, gram[on][:, ~on] @ row[~on])
    return out


def error(w, v, x):
    w, v, x = w.double(), v.double(), x.double()
    return float(((x @ (w - v).t()) ** 2).sum() / ((x @ w.t()) ** 2).sum())


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 99),
    st.sampled_from(["unstructured", "2:4", "2:4@8", "8:16@7", "block:4x2"]),
    st.sampled_from([0.3, 0.5, 0.8]),
)
def test_equals_a_direct_solve_in_float64(seed, pattern, sparsity):
    w, x = layer(seed)
    task = problem(w, x, pattern, sparsity)
    solution = Composition.parse("wanda+ls").run(task)[1]
    want = direct(w, solution.keep, task.stats["gram"], 0.01)
    scale = x.norm(dim=0).double()
    far = ((solution.weight - want) * scale).norm() / (want * scale).norm()
    assert far < (5e-3 if task.pattern.rows == 1 else 2e-5)
    assert error(w, solution.weight, x) <= error(w, want, x) * 1.01 + 1e-9
    assert (solution.weight[~solution.keep] == 0).all()


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 99),
    st.sampled_from(["random", "magnitude", "wanda"]),
    st.sampled_from(["unstructured", "2:4", "4:8@6"]),
)
def test_no_other_weights_on_the_support_do_better_as_the_ridge_vanishes(seed, method, pattern):
    w, x = layer(seed)
    first = Composition.parse(method).run(problem(w, x, pattern))[0]
    gram = (x.double().t() @ x.double()).float()
    scale = x.norm(dim=0)
    unit = gram / scale / scale.unsqueeze(1)
    solve = by_rows if "@" not in pattern else by_strips
    change, _ = solve(unit.double(), ((w - first.weight) * scale).double(), first.keep, 1e-9, 6)
    best = error(w, first.weight + (change / scale).float(), x)
    ridged = error(w, Composition.parse(f"{method}+ls").run(problem(w, x, pattern))[1].weight, x)
    wiggled = first.weight + change / scale + 1e-2 * torch.randn(w.shape) * first.keep
    assert best <= min(error(w, first.weight, x), ridged, error(w, wiggled, x)) * (1 + 1e-5) + 1e-12


@pytest.mark.parametrize("pattern", ["unstructured", "2:4@8"])
def test_dead_inputs_neither_move_nor_break_the_solve(pattern):
    w, x = layer(5, dead=6)
    solution = Composition.parse("wanda+ls").run(problem(w, x, pattern))[1]
    assert torch.isfinite(solution.weight).all()
    kept = solution.keep[:, :6]
    assert torch.equal(solution.weight[:, :6][kept], w[:, :6][kept])


def test_a_failing_factor_raises_the_ridge_and_says_so(caplog):
    """G that is not positive definite, as rounding can make it."""
    w, x = layer(7)
    task = problem(w, x, "2:4@8")
    indefinite = task.stats["gram"] - 0.05 * torch.diag(task.stats["gram"].diagonal())
    indefinite += torch.diag(0.05 * task.stats["gram"].diagonal()) * -2
    task.stats["gram"] = indefinite
    solution = Composition.parse("magnitude+ls").run(task)[1]
    assert torch.isfinite(solution.weight).all()
    assert solution.notes and "ridge raised from 0.01 to" in solution.notes[0] and "ridge raised" in caplog.text
