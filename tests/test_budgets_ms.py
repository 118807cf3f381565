"""Targets in milliseconds, by a clock that is injected; runs that repeat one without it."""

import json

import numpy as np
import pytest
import torch
from budget_runs import bits, run
from tiny_models import batches, llama
from torch import nn

import zeroskip as zs
from zeroskip.errors import ZeroskipError
from zeroskip.model import Site
from zeroskip.prune import budgets, prune
from zeroskip.prune.budgets import times
from zeroskip.prune.budgets.base import Item
from zeroskip.prune.settings import Settings


def fake_clock(calls):
    def timed(weight, tokens, precision, working_set_bytes):
        calls.append((tuple(weight.shape), tokens, precision, torch.get_num_threads()))
        share = float((weight == 0).double().mean())
        full = weight.numel() / 1000
        faster = 1.6 if weight.shape[0] > 32 else 5.0  # sparse is never faster in the small layers
        return full, ({"csr": full * (0.1 + faster * (1 - share))} if share else {})

    return timed


def taken(model, names):
    out = 0.0
    for name in names:
        dense, sparse = fake_clock([])(model.get_submodule(name).weight.detach(), 1, None, 0)
        out += min([dense, *sparse.values()])
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
    # Once for each shape and share that is asked first, and at most once for each layer at what was decided.
    assert len({call[0] for call in calls}) == 4 and len(calls) <= 4 * len(times.Milliseconds.shares) + len(names)
    account = report.budget
    assert account["unit"] == "ms" and account["dense"] == pytest.approx(dense)
    assert account["reached"] == pytest.approx(taken(model, names), rel=2e-3)
    assert account["reached"] <= account["asked"] * 1.001
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


def test_where_two_layouts_change_places_neither_is_promised_more_than_it_holds(monkeypatch):
    """One falls slowly, one steeply, and they cross between two of the shares that are timed."""

    def timed(weight, tokens, precision, working_set_bytes):
        share = float((weight == 0).double().mean())
        full = weight.numel() / 1000
        return full, {"bitmask": full * (0.9 - 0.2 * share), "csr": full * (2.37 - 2.3 * share)}

    def least(share):
        return min(1.0, 0.9 - 0.2 * share, 2.37 - 2.3 * share)

    monkeypatch.setattr(times, "time_ms", timed)
    cost = times.Milliseconds({"tokens": 1, "threads": 1})
    asked = {"method": "magnitude", "pattern": "unstructured", "sparsity": 0.5, "values": None, "group_size": None}
    item = Item(Site("x", nn.Linear(64, 128, bias=False)), Settings.read(asked))
    cost.prepare([item])
    shares = np.array([0.3, 0.62, 0.68, 0.69, 0.7, 0.72, 0.93])
    assert cost.of(item, shares) == pytest.approx([item.numel / 1000 * least(each) for each in shares], rel=2e-3)


@pytest.mark.parametrize("budget", ["uniform", "global"])
def test_what_was_decided_is_timed_and_decided_again(monkeypatch, budget):
    """Times are a staircase here, which lines through the first shares miss."""

    def timed(weight, tokens, precision, working_set_bytes):
        kept = int((weight[0] != 0).sum())
        steps = -(-kept // 4) * 4 / weight.shape[1]
        return weight.numel() / 1000, {"csr": weight.numel() / 1000 * (0.05 + 1.4 * steps)}

    monkeypatch.setattr(times, "time_ms", timed)
    model, report, _ = run(budget, {"ms": "50%", "tokens": 32}, method="wanda")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
    took = 0.0
    for name in names:
        weight = model.get_submodule(name).weight.detach()
        dense, sparse = timed(weight, 32, None, 0)
        took += min(dense, sparse["csr"] if bool((weight == 0).any()) else dense)
    assert took == pytest.approx(report.budget["reached"], rel=0.03)  # shares that differ by .005 count as one
    assert took == pytest.approx(report.budget["asked"], rel=0.05 if budget == "global" else 0.1)


def test_the_real_clock_knows_each_sparse_layout():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).relu_()
    dense, sparse = times.time_ms(weight, 4, None, weight.nbytes)
    assert dense > 0 and {"csr fp32", "bitmask fp32"} <= sparse.keys() and min(sparse.values()) > 0
