"""`prune` as a user calls it."""

import copy
import json
import math
import re

import pytest
import torch
from tiny_models import MODELS, batches, bert, llama, t5
from torch import nn

from zeroskip.errors import ZeroskipError
from zeroskip.model import find_sites
from zeroskip.prune import Method, Pattern, Report, methods, prune
from zeroskip.prune.composition import Composition

PATTERNS = {"unstructured": 0.6, "2:4": None, "4:8@16": None, "block:4x2": 0.5}


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, two):
    return all(torch.equal(value, two[name]) for name, value in one.items())


def serves(method, pattern):
    return Composition.parse(method).method.serves(Pattern.parse(pattern))


# Solvers of whole blocks do the same after every method, and are tried after one.
NAMES = [name for name in methods() if not Composition.parse(name).block_solvers or name.startswith("wanda")]


def chooses(method):
    return Composition.parse(method).method.chooses


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", NAMES)
def test_a_method_that_cannot_serve_a_pattern_says_so(method, pattern):
    if serves(method, pattern):
        return
    model = llama()
    before = state(model)
    with pytest.raises(ZeroskipError, match=f"'{re.escape(method)}' cannot serve pattern '{pattern}'"):
        prune(model, method, pattern=pattern, sparsity=PATTERNS[pattern], calibration=batches("llama", 2))
    assert same(before, state(model))


@pytest.mark.parametrize(
    ("method", "pattern"), [(m, p) for m in NAMES for p in PATTERNS if serves(m, p) and chooses(m)]
)
def test_every_method_in_every_pattern(method, pattern):
    model, sparsity = llama(), PATTERNS[pattern]
    before = state(model)
    report = prune(model, method, pattern=pattern, sparsity=sparsity, calibration=batches("llama", 2))
    asked = sparsity if sparsity is not None else 0.5
    assert [row.name for row in report.rows] == [site.name for site in find_sites(model)]
    for row, site in zip(report.rows, find_sites(model), strict=True):
        weight = site.module.weight
        zeros = int((weight == 0).sum())
        wanted = round(weight.numel() * asked)
        assert zeros == wanted or (
            zeros > wanted and Composition.parse(method).method.quantizes
        )  # small ones round to zero
        assert row.sparsity == zeros / weight.numel()
        assert not torch.signbit(weight[weight == 0]).any()
        assert torch.isfinite(weight).all()
        if "+" not in method and type(Composition.parse(method).method).run is Method.run:  # it moves no weight
            kept = weight != 0
            assert torch.equal(weight[kept], before[f"{site.name}.weight"][kept])
    pruned = {f"{row.name}.weight" for row in report.rows}
    if Composition.parse(method).block_solvers:  # they move vectors too
        pruned |= {name for name, value in before.items() if value.dim() == 1}
    assert same({name: value for name, value in before.items() if name not in pruned}, model.state_dict())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", ["wanda", "wanda+ls"])
def test_every_architecture(kind, method):
    model, sparsity = MODELS[kind](), 0.5
    report = prune(model, method, sparsity=sparsity, calibration=batches(kind))
    expected = {"llama": 21, "gemma3": 28, "t5": 2 * 6 + 3 * 10, "bert": 18, "gpt2": 8}[kind]
    assert len(report.rows) == expected
    assert all(row.tokens > 0 for row in report.rows)
    if method == "wanda+ls":
        assert all(0 <= row.error <= row.error_before * 1.001 for row in report.rows)
    assert report.skipped == (
        {"pooler.dense": "outside the blocks; name it in include= to prune it"}
        if kind == "bert"
        else {"lm_head": "excluded by 'lm_head'"}
    )


def test_blocks_are_calibrated_on_the_pruned_blocks_before_them():
    """The wanda masks of block 1 are those of a model whose block 0 is already pruned."""
    given = batches("llama", 2)
    model = llama()
    prune(model, "wanda", sparsity=0.5, calibration=given)
    stepwise = llama()
    for layer in range(3):
        prune(stepwise, "wanda", sparsity=0.5, calibration=given, include=f"model.layers.{layer}.*")
    assert same(state(model), state(stepwise))
    assert torch.equal(model(given[0]["input_ids"])[0], stepwise(given[0]["input_ids"])[0])


def test_t5_decoder_sees_the_pruned_encoder():
    given = batches("t5", 2)
    model, stepwise = t5(), t5()
    prune(model, "wanda", sparsity=0.5, calibration=given)
    for part in ("encoder.*", "decoder.*"):
        prune(stepwise, "wanda", sparsity=0.5, calibration=given, include=part)
    assert same(state(model), state(stepwise))


def test_wanda_is_its_formula():
    layer = nn.Linear(8, 6)
    x = torch.randn(50, 8) * torch.arange(1, 9)
    old = layer.weight.detach().clone()
    prune(model := nn.Sequential(layer), "wanda", sparsity=0.25, calibration=[x[:20], x[20:]])
    score = old.abs() * x.norm(dim=0)
    for row in range(6):
        gone = sorted(range(8), key=lambda j, row=row: float(score[row, j]))[:2]
        assert (model[0].weight[row] == 0).nonzero().flatten().tolist() == sorted(gone)


def test_sparsity_zero_is_the_identity():
    for method in NAMES:
        if not serves(method, "unstructured") or Composition.parse(method).method.quantizes:
            continue
        model = llama()
        before = state(model)
        prune(model, method, sparsity=0.0, calibration=batches("llama", 1))
        assert same(before, state(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_stay_in_their_dtype(dtype):
    model = llama(dtype, layers=2)
    report = prune(model, "wanda+ls", pattern="2:4@16", calibration=batches("llama", 2))
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert report.sparsity == 0.5 and all(math.isfinite(row.error) for row in report.rows)


def test_random_depends_on_the_seed_alone():
    one, two, other = llama(), llama(), llama()
    prune(one, "random", sparsity=0.5)
    prune(two, "random", sparsity=0.5, seed=0)
    prune(other, "random", sparsity=0.5, seed=1)
    assert same(state(one), state(two)) and not same(state(one), state(other))


def test_outside_sites_are_pruned_where_they_are_included():
    model = bert()
    report = prune(model, "wanda+ls", sparsity=0.5, calibration=batches("bert"), include=["pooler.dense", "*.0.*"])
    assert [row.name for row in report.rows][-1] == "pooler.dense" and len(report.rows) == 7
    assert report.rows[-1].tokens == 12


def test_a_head_that_is_included_sees_every_token():
    model = llama()
    report = prune(model, "wanda", sparsity=0.5, calibration=batches("llama", 1), include="lm_head", exclude=None)
    assert [row.name for row in report.rows] == ["lm_head"] and report.rows[0].tokens == 41


def test_a_model_that_is_no_transformer():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    report = prune(model, sparsity=0.5, calibration=(torch.randn(32, 8) for _ in range(3)))
    assert len(report.rows) == 2 and report.rows[0].tokens == 96


class Experts(nn.Module):
    """The second expert is never called."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.experts[0](x) + self.experts[2](x)


def test_sites_that_see_no_token_stay_dense_and_are_reported():
    report = prune(Experts(), "wanda", sparsity=0.5, calibration=[torch.randn(4, 8)])
    assert report.skipped == {"experts.1": "saw no calibration token"}
    assert "left dense: experts.1" in str(report)


class Used(nn.Module):
    """A list whose items are never called, only what is in them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)}) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["down"](layer["up"](x).relu())
        return x


def test_lists_whose_items_are_not_called_themselves():
    report = prune(Used(), "wanda+ls", sparsity=0.5, calibration=[torch.randn(40, 8)])
    assert len(report.rows) == 4 and not report.skipped


def test_the_report_is_kept_with_the_model_and_is_json():
    model = llama()
    report = prune(model, pattern="8:16@64", calibration=batches("llama", 1))
    assert model.zeroskip_report is report
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert Report.from_dict(data).rows == report.rows
    assert report.recipe["method"].startswith("obs") and report.recipe["sparsity"] == 0.5
    table = str(report)
    assert "model.layers.2.mlp.down_proj" in table and "21 sites, 50.00% zeros" in table
    assert copy.deepcopy(model).zeroskip_report.rows == report.rows


def test_a_recipe_reproduces_the_run():
    one, two = llama(), llama()
    report = prune(
        one, "magnitude+ls", sparsity=0.3, calibration=batches("llama", 1), exclude=["lm_head", "*.0.*"], seed=3
    )
    prune(two, recipe=json.loads(json.dumps(report.recipe)), calibration=batches("llama", 1))
    assert same(state(one), state(two))


def test_progress_and_training_mode():
    model, told = llama().train(), []
    model.model.layers[1].eval()
    prune(model, "wanda", sparsity=0.5, calibration=batches("llama", 1), progress=lambda *a: told.append(a))
    assert [done for done, total, _ in told] == [0, 1, 2, 3] and all(total == 3 for _, total, _ in told)
    assert model.training and not model.model.layers[1].training
