"""What tuning block by block and distilling the whole model have in common: padding does not count, never worse."""

import pytest
import torch
from tiny_models import batches, bert, llama

from zeroskip.prune import Distill, Tune, prune


@pytest.mark.parametrize("learner", ["tune", "distill"])
def test_what_stands_in_padding_does_not_count(learner):
    def run(filler):
        model, given = bert(), []
        for batch in batches("bert", 2):
            ids = torch.where(batch["attention_mask"].bool(), batch["input_ids"], filler)
            given.append({**batch, "input_ids": ids})
        prune(model, f"wanda+{learner}", pattern="2:4", calibration=given)
        return model.state_dict()

    one, other = run(3), run(7)
    assert all(torch.allclose(value, other[name], atol=1e-5) for name, value in one.items())


@pytest.mark.parametrize(
    ("learner", "method", "note"),
    [
        (Tune, "wanda+ls", "not tuned, because its error rose"),
        (Distill, "wanda", "the model: not distilled, because its error rose"),
    ],
)
def test_what_got_worse_is_put_back(learner, method, note, monkeypatch):
    def spoil(self, block, learning, lessons, draw):
        with torch.no_grad():
            for parameter in learning:
                parameter.mul_(3.0)

    plain, spoiled = llama(), llama()
    given = {"pattern": "2:4", "calibration": batches("llama", 2)}
    prune(plain, method, **given)
    monkeypatch.setattr(learner, "descend", spoil)
    report = prune(spoiled, f"{method}+{learner.__name__.lower()}", **given)
    assert all(torch.equal(value, spoiled.state_dict()[name]) for name, value in plain.state_dict().items())
    assert any(note in each for row in report.rows for each in row.notes)
