"""Tuning a pruned block: nearer to the dense model, zeros kept, nothing else touched, never worse."""

import pytest
import torch
from tiny_models import batches, bert, llama
from torch import nn

from zeroskip.errors import ZeroskipError
from zeroskip.prune import prune
from zeroskip.prune.learner import Learner


def error(model, dense, kind):
    """||y - t||^2 / ||t||^2 of the last hidden states over real tokens."""
    lost = size = 0.0
    for batch in batches(kind, 3):
        with torch.no_grad():
            t = dense(**batch, output_hidden_states=True).hidden_states[-1].double()
            y = model(**batch, output_hidden_states=True).hidden_states[-1].double()
        keep = batch.get("attention_mask", torch.ones(t.shape[:2])).bool()
        lost, size = lost + (y - t)[keep].square().sum(), size + t[keep].square().sum()
    return float(lost / size)


@pytest.mark.parametrize(("kind", "make"), [("llama", llama), ("bert", bert)])
@pytest.mark.parametrize("method", ["wanda", "wanda+ls"])
def test_it_brings_the_model_nearer_to_the_dense_one(monkeypatch, kind, make, method):
    monkeypatch.setattr(Learner, "least", 96)
    plain, tuned = make(), make()
    given = {"pattern": "2:4@16", "calibration": batches(kind, 3)}
    prune(plain, method, **given)
    report = prune(tuned, f"{method}+tune", **given)
    assert error(tuned, make(), kind) < 0.9 * error(plain, make(), kind)
    assert sum("tuning took its error from" in note for row in report.rows for note in row.notes) >= 2


def test_zeros_and_what_was_excluded_stay():
    before, model = llama(), llama()
    prune(model, "wanda+tune", pattern="2:4", calibration=batches("llama", 2), exclude=("lm_head", "*down_proj"))
    moved = {name for name, value in before.state_dict().items() if not torch.equal(value, model.state_dict()[name])}
    assert not any("down_proj" in name or "embed" in name or name == "model.norm.weight" for name in moved)
    assert any("layernorm" in name for name in moved)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name and "down_proj" not in name:
            assert int((module.weight == 0).sum()) == module.weight.numel() // 2
            assert not torch.signbit(module.weight[module.weight == 0]).any()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_types_are_put_back():
    model = llama(torch.bfloat16)
    frozen = model.model.layers[0].input_layernorm.weight.requires_grad_(False)
    same = [id(parameter) for parameter in model.parameters()]
    prune(model, "magnitude+tune", pattern="2:4", calibration=batches("llama", 2))
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    assert [id(parameter) for parameter in model.parameters()] == same and not frozen.requires_grad


class Twice(nn.Module):
    """Calls its only layer two times."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(16, 16)])

    def forward(self, x):
        return self.layers[0](self.layers[0](x).relu())


def test_a_block_that_is_called_twice_is_left_alone():
    report = prune(Twice(), "wanda+tune", pattern="2:4", calibration=[torch.randn(4, 16)])
    assert "not tuned, because layers.0 is not called just once" in report.rows[0].notes[0]


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(ZeroskipError, match="outside torch"):
        prune(llama(), "wanda+tune", pattern="2:4", calibration=batches("llama", 1))


def test_a_tuner_comes_last():
    with pytest.raises(ZeroskipError, match="unknown method 'wanda\\+tune\\+ls'"):
        prune(llama(), "wanda+tune+ls", pattern="2:4", calibration=batches("llama", 1))
