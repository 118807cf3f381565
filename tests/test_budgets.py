"""Budgets: every layer's share by its formula, and the total exactly as asked."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import batches, llama
from torch import nn

import zeroskip as zs
from zeroskip.errors import ZeroskipError
from zeroskip.model import Site
from zeroskip.prune import budgets, prune
from zeroskip.prune.budgets import Budget, Item, Target, solve, times
from zeroskip.prune.budgets.alphapruning import hill
from zeroskip.prune.settings import Settings

DATA = ("owl", "global")


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def zeros(model, report):
    return {row.name: int((model.get_submodule(row.name).weight == 0).sum()) for row in report.rows}


def run(budget, target=None, model=None, **more):
    model = llama() if model is None else model
    more = {"method": "magnitude"} | more
    report = prune(model, budget=budget, target=target, calibration=batches("llama", 2), **more)
    return model, report, zeros(model, report)


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


def test_uniform_is_the_same_everywhere():
    model, report, found = run("uniform", sparsity=0.45678)
    for row in report.rows:
        numel = math.prod(row.shape)
        assert abs(found[row.name] - 0.45678 * numel) <= 1
    plain = llama()
    prune(plain, "magnitude", sparsity=0.5)
    model, _, _ = run("uniform", sparsity=0.5)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in bits(plain).items())


def test_arithmetic_rises_by_one_step():
    _, report, _ = run({"name": "arithmetic", "rise": 0.2}, sparsity=0.5)
    for row in report.rows:
        block = int(row.name.split(".")[2])
        assert row.sparsity == pytest.approx(0.5 + 0.1 * (block - 1), abs=2e-3)
    _, report, _ = run({"name": "arithmetic", "rise": -0.2}, sparsity=0.95)  # the last block is held at `most`
    by_block = [max(r.sparsity for r in report.rows if f".{b}." in r.name) for b in range(3)]
    assert by_block[0] == pytest.approx(0.99, abs=1e-2) and by_block[0] > by_block[2]


def test_erk_is_proportional_to_the_sum_over_the_product():
    _, report, _ = run("erk", sparsity=0.7)
    ratio = [(1 - r.sparsity) / ((r.shape[1] + r.shape[2]) / (r.shape[1] * r.shape[2])) for r in report.rows]
    assert np.ptp(ratio) / np.mean(ratio) < 0.02
    _, report, _ = run("erk", sparsity=0.1)  # small layers hit dense, the others make up for it
    assert any(row.sparsity == 0 for row in report.rows) and all(row.sparsity < 0.25 for row in report.rows)


def test_owl_by_hand():
    model, given = llama(), batches("llama", 2)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:3, :2] *= 30
        model.model.layers[2].mlp.up_proj.weight[:1, :1] *= 30
    inputs = {}

    def hook(name):
        def keep(module, args):
            mask = given[len(inputs.setdefault(name, []))]["attention_mask"] != 0
            inputs[name].append(args[0][mask])

        return keep

    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        for batch in given:
            model(**batch)
    for handle in handles:
        handle.remove()
    share = []
    for block in range(3):
        parts = [
            (model.get_submodule(name).weight.detach().abs() * torch.cat(inputs[name]).norm(dim=0)).flatten()
            for name in names
            if f"layers.{block}." in name
        ]
        product = torch.cat(parts)
        share.append(float((product > 5 * product.mean()).float().mean()))
    place = (np.array(share) - min(share)) / (max(share) - min(share))
    want = 0.6 - 0.2 * (place - place.mean())  # the blocks are equally large
    _, report, _ = run({"name": "owl", "spread": 0.1}, sparsity=0.6, model=model)
    for row in report.rows:
        assert row.sparsity == pytest.approx(want[int(row.name.split(".")[2])], abs=2e-3)
    assert np.ptp(want) == pytest.approx(0.2)


def test_alphapruning_leaves_heavy_tails_denser():
    g = torch.Generator().manual_seed(0)
    model = llama()
    for block, decay in enumerate((0.5, 1.0, 2.0)):
        for module in model.model.layers[block].modules():
            if isinstance(module, nn.Linear):
                u, _ = torch.linalg.qr(torch.randn(module.out_features, 16, generator=g))
                v, _ = torch.linalg.qr(torch.randn(module.in_features, 16, generator=g))
                s = torch.arange(1, 17).float() ** -decay
                module.weight.data = (u * s) @ v.t()
    _, report, _ = run({"name": "alphapruning", "spread": 0.2}, sparsity=0.5, model=model)
    mean = [np.mean([r.sparsity for r in report.rows if f"layers.{b}." in r.name]) for b in range(3)]
    assert mean[0] > mean[1] > mean[2]
    assert mean[0] / mean[2] == pytest.approx(1.2 / 0.8, rel=0.02)


def test_hill_is_the_exponent_of_a_power_law():
    n = 4000
    values = (np.arange(1, n + 1) / (n + 1)) ** (-1 / 1.7)  # quantiles of a density ~ x^-(1.7 + 1)
    weight = torch.diag(torch.from_numpy(np.sqrt(values[:600])))
    assert hill(weight) == pytest.approx(2.7, rel=0.05)
    assert hill(torch.zeros(3, 4)) == 1.0


def test_global_is_one_threshold_over_all_weights():
    model = llama()
    with torch.no_grad():
        for block, factor in enumerate((1.0, 1.3, 0.6)):
            for module in model.model.layers[block].modules():
                if isinstance(module, nn.Linear):
                    module.weight *= factor
    before = bits(model)
    model, report, found = run({"name": "global", "relative": 0, "most": 0.999}, sparsity=0.5, model=model)
    every = torch.cat([before[f"{name}.weight"].abs().flatten() for name in found])
    limit = every.sort().values[round(len(every) * 0.5) - 1]
    for name in found:
        assert abs(found[name] - int((before[f"{name}.weight"].abs() <= limit).sum())) <= 1
    assert np.ptp([row.sparsity for row in report.rows]) > 0.2


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "snip", "synflow", "random"])
def test_global_takes_the_scores_of_any_method(monkeypatch, method):
    import sys

    monkeypatch.setattr(sys.modules["zeroskip.prune.synflow"], "ROUNDS", 2)
    model, _, found = run("global", sparsity=0.6, method=method)
    total = sum(model.get_submodule(name).weight.numel() for name in found)
    assert sum(found.values()) == round(0.6 * total)


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


def fake_clock(calls):
    def timed(weight, tokens, precision, working_set_bytes):
        calls.append((tuple(weight.shape), tokens, precision, torch.get_num_threads()))
        share = float((weight == 0).double().mean())
        full = weight.numel() / 1000
        faster = 1.6 if weight.shape[0] > 32 else 5.0  # sparse is never faster in the small layers
        return full, (full * (0.1 + faster * (1 - share)) if share else None)

    return timed


def taken(model, names):
    out = 0.0
    for name in names:
        dense, sparse = fake_clock([])(model.get_submodule(name).weight.detach(), 1, None, 0)
        out += min(dense, math.inf if sparse is None else sparse)
    return out


@pytest.mark.parametrize("budget", budgets())
@pytest.mark.parametrize("pattern", ["unstructured", "4:16"])
def test_milliseconds_are_met_by_the_clock_that_measured_them(monkeypatch, budget, pattern):
    calls = []
    monkeypatch.setattr(times, "time_ms", fake_clock(calls))
    before = torch.get_num_threads()
    model, report, _ = run(budget, {"ms": "55%", "tokens": 32, "threads": 2, "precision": "bf16"}, pattern=pattern)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
    dense = sum(model.get_submodule(name).weight.numel() for name in names) / 1000
    assert taken(model, names) <= 0.55 * dense * 1.001
    assert taken(model, names) >= 0.55 * dense * (0.95 if pattern == "unstructured" else 0.88)
    assert {call[1:] for call in calls} == {(32, "bf16", 2)} and torch.get_num_threads() == before
    assert len({call[0] for call in calls}) == 4 and len(calls) <= 4 * 7  # once for each shape and share
    account = report.budget
    assert account["unit"] == "ms" and account["dense"] == pytest.approx(dense)
    assert account["reached"] == pytest.approx(taken(model, names), rel=2e-3) and account["reached"] <= account["asked"]
    assert f"budget {budget}: " in str(report)
    if budget == "global":  # no zeros where they gain nothing
        assert all(report.recipe["allocation"][n] in (0, "dense") for n in names if "k_proj" in n or "v_proj" in n)


def test_a_run_by_the_clock_is_reproduced_without_one(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(times, "time_ms", fake_clock(calls))
    one, report, _ = run("global", {"ms": "60%"}, method="wanda+ls")
    zs.save(one, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "zeroskip.json").read_text())["recipe"]
    monkeypatch.setattr(times, "time_ms", None)
    two = llama()
    again = prune(two, recipe=saved, calibration=batches("llama", 2))
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in bits(one).items())
    assert again.recipe == report.recipe == saved
    assert {row.name: row.sparsity for row in again.rows} == {row.name: row.sparsity for row in report.rows}


def test_a_resumed_run_keeps_the_allocation(monkeypatch, tmp_path):
    monkeypatch.setattr(times, "time_ms", fake_clock([]))
    asked = {"target": {"ms": "60%"}, "budget": "owl", "method": "wanda", "calibration": batches("llama", 2)}
    one, two = llama(), llama()
    prune(one, journal=tmp_path / "j", **asked)
    (tmp_path / "j" / "00002.safetensors").unlink()
    monkeypatch.setattr(times, "time_ms", None)
    prune(two, journal=tmp_path / "j", **asked)
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in bits(one).items())
    (tmp_path / "j" / "allocation.json").write_text("{")
    with pytest.raises(ZeroskipError, match=r"allocation\.json is not readable: delete"):
        prune(llama(), journal=tmp_path / "j", **asked)


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


WRONG = [
    ({"budget": "owel"}, r"unknown budget 'owel' \(did you mean 'owl'\?\)"),
    ({"budget": 3}, "budget is 3: give a name"),
    ({"budget": {"spread": 0.1}}, "budget is .*: give a name"),
    ({"budget": {"name": "owl", "sprd": 0.1}}, r"budget 'owl' has no option 'sprd' \(did you mean 'spread'"),
    ({"budget": {"name": "owl", "spread": 2}}, r"spread is 2: give a number in \[0, 0.5\]"),
    ({"budget": {"name": "owl", "spread": "x"}}, "spread is 'x'"),
    ({"budget": {"name": "owl", "least": 0.9, "most": 0.5}}, "least is 0.9, more than most, 0.5"),
    ({"budget": "erk", "sparsity": None}, "budget 'erk' needs a target: give a sparsity"),
    ({"target": {"params": "50%"}}, "sparsity is 0.5, and the target .*: leave one out"),
    ({"target": 5, "sparsity": None}, "target is 5: give a map"),
    ({"target": {}, "sparsity": None}, "target names no unit: give one of sparsity, params, flops, bytes, ms"),
    ({"target": {"ms": 1, "bytes": 2}, "sparsity": None}, "target names ms and bytes|unknown entry"),
    ({"target": {"mss": 1}, "sparsity": None}, r"target has an unknown entry 'mss'"),
    ({"target": {"params": 5, "tokens": 1}, "sparsity": None}, "target has an unknown entry 'tokens'"),
    ({"target": {"ms": 1, "tokens": 0}, "sparsity": None}, "tokens is 0: give a whole number"),
    ({"target": {"ms": 1, "threads": True}, "sparsity": None}, "threads is True"),
    ({"target": {"ms": 1, "precision": "bf61"}, "sparsity": None}, "precision is 'bf61'"),
    ({"target": {"ms": math.nan}, "sparsity": None}, "ms is nan: give a number"),
    ({"target": {"ms": -1}, "sparsity": None}, "give more than 0"),
    ({"target": {"sparsity": "50%"}, "sparsity": None}, "sparsity is '50%': give a number"),
    ({"target": {"sparsity": 1.0}, "sparsity": None}, r"fraction of zeros in \[0, 1\)"),
    ({"target": {"params": 10}, "sparsity": None}, "params 10 is out of reach: with at most 0.99 zeros"),
    ({"target": {"bytes": 10}, "sparsity": None}, "bytes 10 is out of reach"),
    ({"budget": "owl", "sparsity": 0.995}, "out of reach"),
    ({"budget": "owl", "calibration": None}, "budget 'owl' needs data"),
    ({"budget": "owl", "method": "gptq"}, "keeps the zeros that are there"),
    ({"budget": "owl", "recipe": {"rules": [{"include": "*", "sparsity": 0.1}]}}, "budget 'owl' has no layer"),
    (
        {"budget": "uniform", "recipe": {"rules": [{"include": "*_proj", "exclude": "q_proj", "sparsity": 0.9}]}},
        "fewer zeros than rules",
    ),
    ({"target": {"ms": 5}, "sparsity": None, "recipe": {"include": "model.embed_tokens"}}, "ms counts linear layers"),
    ({"recipe": {"allocation": {}}}, "allocation is what a budget made"),
    ({"budget": "erk", "recipe": {"allocation": []}}, "allocation is a list"),
    ({"budget": "erk", "recipe": {"allocation": {"a": 0.5}}}, "allocation names 'a', to which no budget applies"),
    ({"budget": "erk", "recipe": {"allocation": {}}}, r"allocation leaves out model\.layers\.0"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_bad_input_gets_one_line_and_changes_nothing(arguments, message):
    model = llama()
    before = bits(model)
    asked = {"method": "magnitude", "sparsity": 0.5, "calibration": batches("llama", 1)} | arguments
    with pytest.raises(ZeroskipError, match=message) as caught:
        prune(model, **asked)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("share", [1.0, -0.1, True, "2:4", "3:16", None])
def test_an_allocation_must_fit_its_layers(share):
    _, report, _ = run("uniform", {"sparsity": 0.5}, pattern="4:8")
    recipe = json.loads(json.dumps(report.recipe))
    name = next(iter(recipe["allocation"]))
    recipe["allocation"][name] = share
    with pytest.raises(ZeroskipError, match=f"allocation: {name} has") as caught:
        prune(llama(), recipe=recipe)
    assert "\n" not in str(caught.value)
