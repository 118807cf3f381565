"""Budgets, targets and allocations that cannot be served: one line, and nothing changes."""

import json
import math

import pytest
import torch
from budget_runs import bits, run
from tiny_models import batches, llama

from zeroskip.errors import ZeroskipError
from zeroskip.prune import prune

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
    ({"target": {"params": "400%"}, "sparsity": None}, "'400%': more than the dense model has; give up to '100%'"),
    ({"target": {"params": 1e9}, "sparsity": None}, r"params 1e\+09 is more than the dense model has, \d+"),
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
