"""Budgets give every layer the share that its formula says."""

import math

import numpy as np
import pytest
import torch
from budget_runs import bits, run
from tiny_models import batches, llama
from torch import nn

from zeroskip.prune import prune
from zeroskip.prune.budgets.alphapruning import hill


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
