"""Column OBS against the definition, in float64: remove, refit exactly, and take the column that costs least."""

import pytest
import torch

from zeroskip.prune.base import Problem
from zeroskip.prune.composition import Composition
from zeroskip.prune.obs import RIDGE
from zeroskip.prune.patterns import Pattern


def problem(rows, columns, pattern, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(200, columns // 2, generator=draw) @ torch.randn(columns // 2, columns, generator=draw)
    x = x + 0.5 * torch.randn(200, columns, generator=draw)
    weight = torch.randn(rows, columns, generator=draw)
    chosen = Pattern.parse(pattern)
    return Problem("site", weight, chosen, chosen.sparsity, {"gram": x.T @ x, "sumsq": x.square().sum(0)}, draw)


def refit(weight, h, on):
    """The weights on `on` that come nearest to `weight` in the norm of H, and what is left."""
    best = torch.zeros_like(weight)
    best[:, on] = torch.linalg.solve(h[on][:, on], (weight @ h)[:, on].T).T
    gap = weight - best
    return best, float(((gap @ h) * gap).sum())


@pytest.mark.parametrize("pattern", ["2:4@8", "3:8@5", "2:4"])
def test_each_step_removes_the_column_that_costs_least(pattern):
    given = problem(10, 16, pattern)
    nm = given.pattern
    gram = given.stats["gram"].double()
    h = gram + RIDGE * torch.diag(gram.diagonal())
    found = Composition.parse("obs").run(given)[0]
    for top in range(0, 10, nm.rows):
        rows = given.weight[top : top + nm.rows].double()
        on = torch.ones(16, dtype=torch.bool)
        while int(on.sum()) > 16 // nm.of * nm.kept:
            costs = {}
            for column in on.nonzero().flatten().tolist():
                inside = on.view(-1, nm.of)[column // nm.of]
                if int(inside.sum()) > nm.kept:
                    trial = on.clone()
                    trial[column] = False
                    costs[column] = refit(rows, h, trial)[1]
            on[min(costs, key=costs.__getitem__)] = False
        assert torch.equal(found.keep[top], on)
        torch.testing.assert_close(
            found.weight[top : top + nm.rows].double(), refit(rows, h, on)[0], rtol=1e-3, atol=1e-3
        )


def test_it_beats_wanda_on_correlated_inputs_and_keeps_the_counts():
    given = problem(64, 64, "8:16@32", seed=3)
    gram = given.stats["gram"].double()
    errors = {}
    for name in ("wanda+ls", "obs", "obs+ls"):
        last = Composition.parse(name).run(given)[1]
        assert (last.keep.view(64, 4, 16).sum(2) == 8).all() and (last.weight[~last.keep] == 0).all()
        gap = (given.weight - last.weight).double()
        errors[name] = float(((gap @ gram) * gap).sum())
    assert errors["obs"] < errors["wanda+ls"]
    assert errors["obs+ls"] < errors["obs"]  # the ridge pulls towards what OBS found, no longer towards the start


def test_a_dead_input_goes_first():
    given = problem(8, 16, "2:4@8")
    gram = given.stats["gram"].clone()
    gram[5], gram[:, 5] = 0, 0
    solution = Composition.parse("obs").run(
        Problem("site", given.weight, given.pattern, given.sparsity, {"gram": gram}, given.generator)
    )[0]
    assert not solution.keep[:, 5].any() and torch.isfinite(solution.weight).all()
