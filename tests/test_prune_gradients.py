"""Methods that score by derivatives, against what the derivative is on models where it can be written down."""

import sys

import pytest
import torch
from tiny_models import batches, bert, llama, t5
from torch import nn

from zeroskip.calibrate import read_batches
from zeroskip.errors import ZeroskipError
from zeroskip.model import find_sites
from zeroskip.prune import prune
from zeroskip.prune.base import Survey
from zeroskip.prune.composition import Composition
from zeroskip.prune.patterns import Pattern


def survey(model, method, given, loss=None, sparsity=0.5):
    batches = read_batches(model, given, one_logit=False) if given is not None else []
    sites = find_sites(model)
    patterns = {site.name: Pattern.parse("unstructured") for site in sites}
    found = Composition.parse(method).method.survey(
        Survey(model, sites, batches, loss, patterns, dict.fromkeys(patterns, sparsity), 0)
    )
    return {name: next(iter(stats.values()))[0] for name, stats in found.items()}


def test_snip_is_the_mean_gradient():
    model = nn.Sequential(nn.Linear(6, 4))
    given = [torch.randn(5, 6), torch.randn(9, 6)]
    found = survey(model, "snip", given, lambda output, batch: output.square().mean())["0"]
    w, b = model[0].weight.detach(), model[0].bias.detach()
    want = sum(2 * (x @ w.t() + b).t() @ x / (len(x) * 4) for x in given) / 2
    torch.testing.assert_close(found, want)
    assert model[0].weight.grad is None and model[0].weight.requires_grad


def test_grasp_is_the_hessian_times_the_gradient():
    model = nn.Sequential(nn.Linear(6, 3, bias=False)).double()
    given = [torch.randn(20, 6, dtype=torch.float64) for _ in range(2)]
    found = survey(model, "grasp", given, lambda output, batch: output.square().sum() / 2)["0"]
    w, h = model[0].weight.detach(), sum(x.t() @ x for x in given) / 2
    torch.testing.assert_close(found.double(), w @ h @ h, rtol=1e-5, atol=1e-5)


def test_synflow_conserves_the_flow_from_layer_to_layer():
    """In a net of linear layers and ReLU without biases the scores of every layer sum to R."""
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 5, bias=False)).half()
    before = [p.detach().clone() for p in model.parameters()]
    found = survey(model, "synflow", None)
    assert found["0"].dtype == torch.float64
    torch.testing.assert_close(found["0"].sum(), found["2"].sum())
    assert all(p.dtype == torch.float16 and torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    zeros = int((found["0"] == 0).sum())
    assert 0 < zeros < 128 * 0.5 + 1  # the rounds before the last have taken the weakest


@pytest.mark.parametrize("make", [llama, t5, bert])
def test_synflow_needs_no_data_on_transformers(monkeypatch, make):
    monkeypatch.setattr(sys.modules["zeroskip.prune.synflow"], "ROUNDS", 3)
    model = make()
    report = prune(model, "synflow", sparsity=0.5)
    assert report.sparsity == 0.5 and all(torch.isfinite(p).all() for p in model.parameters())


def test_a_model_without_logits_needs_a_loss():
    with pytest.raises(ZeroskipError, match="loss= is missing"):
        prune(bert(), "snip", sparsity=0.5, calibration=batches("bert", 1))
    report = prune(
        bert(),
        "snip",
        sparsity=0.5,
        calibration=batches("bert", 1),
        loss=lambda o, b: o.last_hidden_state.square().mean(),
    )
    assert report.sparsity == 0.5


def test_padding_does_not_count_in_the_default_loss():
    given = batches("llama", 1)
    other = [dict(given[0], input_ids=given[0]["input_ids"].clone())]
    assert given[0]["attention_mask"][0, -1] == 0
    other[0]["input_ids"][0, -1] = 7  # a padded token, which nobody sees
    one, two = survey(llama(), "snip", given), survey(llama(), "snip", other)
    assert all(torch.allclose(value, two[name], atol=1e-7) for name, value in one.items())


def test_a_model_that_cannot_be_run_on_ones_asks_for_a_batch():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, y):
            return self.layer(x) + y

    with pytest.raises(ZeroskipError, match="give one calibration batch"):
        prune(Two(), "synflow", sparsity=0.5)
    report = prune(Two(), "synflow", sparsity=0.5, calibration=[(torch.randn(2, 4), torch.randn(2, 4))])
    assert report.sparsity == 0.5
