"""Edges of calibration: too little data, matrices without an inverse, weights with two names."""

import logging

import pytest
import torch
from layers import layer, problem
from tiny_models import batches, llama

from zeroskip.formats import get, names, pack, unpack
from zeroskip.planning.zeros import find_zeros
from zeroskip.prune import Method, Pattern, prune
from zeroskip.prune.composition import Composition

SOLVING = [name for name, kind in Method.known.items() if "gram" in kind.needs]


@pytest.mark.parametrize(("method", "tokens", "short"), [("wanda", 15, True), ("wanda", 32, False), ("obs", 100, True)])
def test_too_few_tokens_are_said_with_the_figure(caplog, method, tokens, short):
    model = llama(layers=2)
    given = [torch.arange(tokens).remainder(96).view(1, -1)]
    with caplog.at_level(logging.WARNING):
        report = prune(model, method, pattern="2:4@16", calibration=given)
    noted = {row.name.rsplit(".", 1)[-1]: row.notes for row in report.rows if row.notes}
    wanted = {"wanda": 32, "obs": 128}[method]
    text = f"calibrated on only {tokens} tokens; '{method}' wants {wanted} at least for 64 inputs: give more data"
    assert ("down_proj" in noted) == short and (not short or noted["down_proj"] == [text])
    assert ("q_proj" in noted) == (tokens < wanted // 2)
    warned = [record for record in caplog.records if "calibrated on only" in record.message]
    assert len(warned) == short and all("the report names every such layer" in record.message for record in warned)


@pytest.mark.parametrize("method", ["magnitude", "random", "synflow", "rtn"])
def test_methods_without_statistics_want_no_tokens(method):
    assert Composition.parse(method).tokens_wanted(4096) == 0
    assert Composition.parse(f"{method}+ls").tokens_wanted(4096) == 8192


@pytest.mark.parametrize("method", SOLVING)
@pytest.mark.parametrize("kind", ["no tokens of use", "one token", "twins", "huge and tiny"])
def test_matrices_without_an_inverse(method, kind):
    w, x = layer(5, tokens=40)
    if kind == "no tokens of use":
        x = torch.zeros_like(x)
    elif kind == "one token":
        x = x[:1]
    elif kind == "twins":
        x[:, 16:] = x[:, :16]
    else:
        x[:, :16] *= 1e6
        x[:, 16:] *= 1e-6
    pattern, asked = ("2:4", None) if Method.known[method].chooses else ("unstructured", 0.5)
    task = problem(w.masked_fill(w.abs() < 0.5, 0.0) if asked else w, x, pattern, 0.5, tokens=len(x))
    for solution in Composition.parse(f"{method}+ls").run(task):
        assert torch.isfinite(solution.weight).all()
        if asked is None:
            assert (solution.keep.view(24, 8, 4).sum(2) == 2).all() and (solution.weight[~solution.keep] == 0).all()


def test_weights_with_two_names_are_calibrated_and_pruned_once():
    model = llama(layers=1)
    tied = model.lm_head.weight
    assert tied is model.model.embed_tokens.weight
    report = prune(
        model,
        "wanda",
        pattern="2:4",
        calibration=batches("llama", 2),
        include=["embed_tokens", "lm_head"],
        exclude=None,
    )
    assert [row.name for row in report.rows] == ["lm_head"]
    assert report.skipped["model.embed_tokens"] == "shares its weight with lm_head, which is pruned"
    assert model.lm_head.weight is model.model.embed_tokens.weight is tied
    assert ((tied != 0).view(96, 8, 4).sum(2) == 2).all()


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("2:4t", "2:4"),
        ("8:16t", "8:16"),
        ("2:4+dense:25%", None),
        ("8:16@64+dense:50%rows", None),
        ("8:16@64", "8:16@64"),
        ("block:1x4", "block:1x4"),
        ("unstructured:columns128", "unstructured"),
    ],
)
def test_what_a_pattern_packs_to_says_so_and_comes_back(pattern, found):
    w, _ = layer(0, 128, 256)
    chosen = Pattern.parse(pattern)
    chosen.check((1, 128, 256), "layer")
    w = w.masked_fill(~chosen.select(w.abs(), chosen.sparsity or 0.5), 0.0)
    assert found is None or find_zeros(w).pattern == found
    takes = [name for name in names() if "fp32" in get(name).values and get(name).accepts(w) is None]
    assert {"csr", "bitmask"} <= set(takes) and ("strip_nm" in takes) == (found == "8:16@64")
    for name in takes:
        assert torch.equal(unpack(pack(w, name)), w)


@pytest.mark.parametrize(
    "pattern", ["unstructured", "2:4", "2:4t", "8:16@64", "block:4x1", "block:4x4", "2:4+dense:25%"]
)
def test_without_a_name_the_method_follows_the_pattern(pattern):
    chosen, one, two = Pattern.parse(pattern), llama(layers=1), llama(layers=1)
    given = {"pattern": pattern, "calibration": batches("llama", 2)}
    given |= {"sparsity": 0.5} if chosen.sparsity is None else {}
    report = prune(one, **given)
    shared = chosen.rows > 1 and Method.known["obs"]().serves(chosen)
    assert report.recipe["method"].split("+")[0] == ("obs" if shared else "admm")
    prune(two, report.recipe["method"], **given)
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
