"""Budgets meet their target exactly, in every unit, pattern and kind of layer."""

import math

import pytest
import torch
from budget_runs import run
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import batches, llama
from torch import nn

import zeroskip as zs
from zeroskip.errors import ZeroskipError
from zeroskip.model import Site
from zeroskip.prune import budgets, prune
from zeroskip.prune.budgets import Budget, Item, Target, solve
from zeroskip.prune.settings import Settings


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x2"])
@pytest.mark.parametrize("budget", budgets())
def test_the_total_is_exact(budget, pattern):
    for share in (0.3, 0.6180339, 0.9):
        model, report, found = run(budget, sparsity=share, pattern=pattern)
        total = sum(model.get_submodule(name).weight.numel() for name in found)
        unit = 8 if "block" in pattern else 1
        assert abs(sum(found.values()) - round(total * share)) <= unit // 2
        for row in report.rows:
            assert found[row.name] % unit == 0 and row.sparsity == row.sparsity_asked
        assert report.recipe["budget"] == budget and len(report.recipe["allocation"]) == 21


@pytest.mark.parametrize("budget", budgets())
def test_every_unit_of_a_target(budget):
    dense = {"params": 3 * 9216, "flops": 2 * 12 * 3 * 9216}  # a row of a batch has 12 tokens
    for unit, whole in dense.items():
        for amount in (whole * 0.4, "40%"):
            model, report, found = run(budget, {unit: amount})
            kept = sum(model.get_submodule(name).weight.numel() for name in found) - sum(found.values())
            assert math.floor(3 * 9216 * 0.4) - 1 <= kept <= 3 * 9216 * 0.4
            assert "sparsity" not in report.recipe or report.recipe["sparsity"] is None


@pytest.mark.parametrize("budget", ["uniform", "global"])
def test_bytes_are_those_of_the_smallest_format(budget):
    model, _, found = run(budget, {"bytes": "70%"})
    stored = dense = 0
    for name in found:
        weight = model.get_submodule(name).weight.detach()
        sizes = []
        for format in zs.formats():
            try:
                sizes.append(zs.pack(weight, format).nbytes)
            except ZeroskipError:
                continue
        stored += min(sizes)
        dense += zs.pack(weight, "dense").nbytes
    assert 0.97 * 0.7 * dense <= stored <= 1.01 * 0.7 * dense


@pytest.mark.parametrize("budget", budgets())
def test_patterns_with_n_of_m_get_another_n(budget):
    model, report, found = run(budget, {"sparsity": 0.55}, pattern="4:8@16", method="wanda+ls")
    total = sum(math.prod(module.weight.shape) for name, module in model.named_modules() if "_proj" in name)
    got = sum(found.values()) / total
    assert 0.55 <= got <= 0.55 + 64 * 32 / 8 / total + 1e-9  # the largest layer's next N
    for row in report.rows:
        weight = model.get_submodule(row.name).weight
        kept = int(row.pattern.partition(":")[0])
        assert row.pattern == f"{kept}:8@16" and int((weight == 0).sum()) * 8 == weight.numel() * (8 - kept)
    report = prune(llama(), "magnitude", pattern="2:4", budget=budget, calibration=batches("llama", 1))
    assert sum(row.sparsity * math.prod(row.shape) for row in report.rows) + 0 >= 0.5 * total - 1e-6


def test_rules_hold_what_they_say_and_the_budget_shares_the_rest():
    rules = [{"include": "q_proj", "sparsity": 0.9}, {"include": "k_proj", "pattern": "2:4"}]
    rules += [{"include": "v_proj", "dense": True}, {"include": "lm_head", "method": "rtn"}]
    model = llama()
    report = prune(model, "magnitude", sparsity=0.6, budget="erk", recipe={"rules": rules})
    rows = {row.name: row for row in report.rows}
    count = 0
    for name, row in rows.items():
        if name.endswith("q_proj"):
            assert row.sparsity == round(0.9 * 1024) / 1024
        elif name.endswith("k_proj"):
            assert row.pattern == "2:4"
        count += 0 if name == "lm_head" else int((model.get_submodule(name).weight == 0).sum())
    total = 3 * (9216 - 512)
    assert count == round(0.6 * total) and report.recipe["allocation"].keys().isdisjoint(
        {name for name in rows if name.endswith(("q_proj", "k_proj", "lm_head"))}
    )


@pytest.mark.parametrize("budget", ["uniform", "erk", "owl", "alphapruning", "global"])
@pytest.mark.parametrize("target", [{"sparsity": 0.7}, {"flops": "30%"}])
def test_convolutions_and_gates_count_too(budget, target):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.group = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 9, 3, groups=3)
            self.rnn, self.out = nn.LSTM(9, 7, batch_first=True), nn.Linear(7, 5)

        def forward(self, x):
            x = self.group(self.conv(x).relu()).relu()
            return self.out(self.rnn(x.flatten(2).transpose(1, 2))[0])

    torch.manual_seed(0)
    model = Net()
    report = prune(model, "wanda", budget=budget, target=target, calibration=[torch.randn(2, 4, 9, 9)])
    uses = {"conv": 49, "group": 25, "rnn.weight_ih_l0": 25, "rnn.weight_hh_l0": 25, "out": 25}
    weights = {
        row.name: model.get_parameter(row.name if "rnn" in row.name else f"{row.name}.weight") for row in report.rows
    }
    assert weights.keys() == uses.keys()
    kept = {name: int((weight != 0).sum()) for name, weight in weights.items()}
    if "flops" in target:
        total = sum(2 * uses[name] * weight.numel() for name, weight in weights.items())
        got = sum(2 * uses[name] * count for name, count in kept.items())
        assert 0.3 * total - 100 < got <= 0.3 * total
    else:
        total = sum(weight.numel() for weight in weights.values())
        assert sum(kept.values()) == total - round(0.7 * total)


def item(rows, columns, pattern="unstructured"):
    values = {"method": "magnitude", "pattern": pattern, "sparsity": None, "values": None, "group_size": None}
    values["sparsity"] = None if ":" in pattern and "block" not in pattern else 0.0
    return Item(Site("x", nn.Linear(columns, rows, bias=False)), Settings.read(values), "b", 0.5)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6),
    st.floats(0, 0.95),
    st.sampled_from(["uniform", "arithmetic", "erk", "global"]),
)
def test_any_sizes_and_shares_add_up(shapes, share, name):
    items = [item(rows, columns) for rows, columns in shapes]
    budget, target = Budget.read({"name": name, "most": 0.9999}), Target.read({"sparsity": share})
    total = sum(each.numel for each in items)
    wanted = round(total * share)
    if wanted > sum(math.floor(0.9999 * each.numel) for each in items):
        with pytest.raises(ZeroskipError, match="out of reach"):
            solve(budget, target, target.cost(), items, [])
        return
    outcome = solve(budget, target, target.cost(), items, [])
    counts = outcome.zeros
    assert outcome.reached == pytest.approx(total - wanted) and outcome.dense == total
    assert sum(counts) == wanted
    assert all(0 <= count < each.numel for count, each in zip(counts, items, strict=True))
