"""Learning with all pruned layers at once: nearer to what the dense model returns, zeros kept, never worse."""

import json

import pytest
import torch
from cli_models import cli
from tiny_models import MODELS, batches, bert, llama, t5, tokens
from torch import nn

import zeroskip
from zeroskip.calibrate import Lesson
from zeroskip.errors import ZeroskipError
from zeroskip.prune import Distill, methods, prune
from zeroskip.prune.composition import Composition
from zeroskip.prune.learner import Learner


def returned(model, batch):
    """What the model returns, over real tokens, in float64."""
    with torch.no_grad():
        output = model(**batch)
    tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    mask = batch.get("decoder_attention_mask", batch["attention_mask"])
    return tensor.double()[mask.bool()]


def divergence(model, dense, kind):
    """Mean Kullback-Leibler divergence of the logits of the dense model and these."""
    found = []
    for batch in batches(kind):
        p, q = (returned(each, batch).softmax(-1) for each in (dense, model))
        found.append((p * (p.log() - q.log())).sum(-1))
    return float(torch.cat(found).mean())


def relative(model, dense, kind):
    """Mean of |y - t|^2 / |t|^2."""
    found = []
    for batch in batches(kind):
        y, t = returned(model, batch), returned(dense, batch)
        found.append((y - t).square().sum(-1) / t.square().sum(-1))
    return float(torch.cat(found).mean())


@pytest.mark.parametrize(
    ("kind", "make", "error"), [("llama", llama, divergence), ("t5", t5, divergence), ("bert", bert, relative)]
)
@pytest.mark.parametrize("method", ["wanda+ls", "wanda+ls+tune"])
def test_it_brings_the_model_nearer_to_the_dense_one(monkeypatch, kind, make, error, method):
    monkeypatch.setattr(Learner, "least", 96)
    plain, distilled = make(), make()
    given = {"pattern": "2:4@16", "calibration": batches(kind)}
    prune(plain, method, **given)
    report = prune(distilled, f"{method}+distill", **given)
    assert error(distilled, make(), kind) < 0.9 * error(plain, make(), kind)
    assert "the model: distillation took" in report.rows[0].notes[-1]
    assert sum("distillation" in note for row in report.rows for note in row.notes) == 1


def test_zeros_stay_and_only_pruned_blocks_learn():
    before, model = llama().state_dict(), llama()
    given = {"exclude": ("lm_head", "*down_proj", "model.layers.2.*"), "calibration": batches("llama", 2)}
    report = prune(model, "wanda+distill", pattern="2:4", **given)
    after = model.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    vectors = {f"model.layers.{i}.{n}_layernorm.weight" for i in (0, 1) for n in ("input", "post_attention")}
    assert moved == {f"{row.name}.weight" for row in report.rows} | vectors
    for row in report.rows:
        weight = after[f"{row.name}.weight"]
        assert int((weight == 0).sum()) == weight.numel() // 2
        assert not torch.signbit(weight[weight == 0]).any()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_the_target_is_what_the_dense_model_returned(monkeypatch):
    """Also where blocks are pruned before it is asked for, and where a block that stays dense comes last."""
    dense, seen = llama(), []

    def learn(self, block, learning, lessons, draw):
        seen.extend(lesson() for lesson in lessons)

    monkeypatch.setattr(Distill, "descend", learn)
    given = batches("llama", 2)
    prune(llama(), "wanda+distill", pattern="2:4", calibration=given, exclude=("lm_head", "model.layers.2.*"))
    for lesson, batch in zip(seen, given, strict=True):
        with torch.no_grad():
            assert torch.equal(lesson.target, dense(**batch, use_cache=False).logits)
        assert torch.equal(lesson.visible, batch["attention_mask"].bool())


@pytest.mark.parametrize(("kind", "type"), [("llama", torch.bfloat16), ("gpt2", torch.bfloat16), ("t5", torch.float16)])
def test_types_are_put_back(kind, type):
    model = MODELS[kind]().to(type)
    frozen = next(value for name, value in model.named_parameters() if value.dim() == 1).requires_grad_(False)
    same = [id(parameter) for parameter in model.parameters()]
    report = prune(model, "wanda+distill", pattern="2:4", calibration=batches(kind, 2))
    assert {value.dtype for value in model.state_dict().values()} == {type}
    assert [id(parameter) for parameter in model.parameters()] == same and not frozen.requires_grad
    assert "distillation took" in report.rows[0].notes[-1]


class Net(nn.Module):
    """Two convolutions and a head: its output has two dimensions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def test_a_convolutional_network(monkeypatch):
    monkeypatch.setattr(Learner, "least", 96)
    given = [torch.randn(8, 4, 9, 9, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    dense, plain, model, half = Net(), Net(), Net(), Net().bfloat16()
    prune(plain, "wanda", sparsity=0.5, calibration=given)
    prune(model, "wanda+distill", sparsity=0.5, calibration=given)
    report = prune(half, "wanda+distill", sparsity=0.5, calibration=[x.bfloat16() for x in given])
    assert "distillation took" in report.rows[0].notes[-1]
    with torch.no_grad():
        errors = [sum(float((each(x) - dense(x)).square().sum()) for x in given) for each in (plain, model)]
    assert errors[1] < 0.9 * errors[0]


def test_only_the_layers_whose_rule_asks_for_it_learn():
    before, model = llama().state_dict(), llama()
    rules = [{"include": "model.layers.1.*", "method": "wanda+distill"}]
    recipe = {"method": "wanda", "pattern": "2:4", "rules": rules}
    prune(plain := llama(), "wanda", pattern="2:4", calibration=batches("llama", 2), include="model.layers.0.*")
    prune(model, recipe=recipe, calibration=batches("llama", 2))
    after, alone = model.state_dict(), plain.state_dict()
    for name in before:
        if name.startswith("model.layers.0."):
            assert torch.equal(after[name], alone[name])


def test_the_loss_by_hand():
    target, output = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    visible = torch.tensor([[True, True, False], [True, True, True]])
    got = Distill().loss(output, Lesson((), {}, target, visible))
    y, t = output.double(), target.double()
    tokens_lost = ((y - t).square().sum(-1) / t.square().sum(-1))[visible].mean()
    means = [torch.stack([each[0, :2].mean(0), each[1].mean(0)]) for each in (y, t)]
    apart = (1 - (means[0] * means[1]).sum(1) / means[0].norm(dim=1) / means[1].norm(dim=1)).mean()
    assert float(got) == pytest.approx(float(tokens_lost + apart), rel=1e-5)
    assert Distill().loss(output[:, :2], Lesson((), {}, target, visible)) is None


class Twice(nn.Module):
    """Calls its only layer two times."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(16, 16)])

    def forward(self, x):
        return self.layers[0](self.layers[0](x).relu())


def test_a_model_whose_last_block_is_called_twice_is_left_alone():
    report = prune(Twice(), "wanda+distill", pattern="2:4", calibration=[torch.randn(4, 16)])
    assert "not distilled, because" in report.rows[0].notes[-1]


def test_refusals(tmp_path):
    given = {"pattern": "2:4", "calibration": batches("llama", 1)}
    with pytest.raises(ZeroskipError, match="stream=True keeps one block in memory, and 'wanda\\+distill'"):
        prune(llama(), "wanda+distill", **given, journal=tmp_path / "j", stream=True)
    assert not (tmp_path / "j").exists()
    with torch.inference_mode(), pytest.raises(ZeroskipError, match="'\\+distill' needs gradients"):
        prune(llama(), "wanda+distill", **given)
    with pytest.raises(ZeroskipError, match="unknown method 'wanda\\+distill\\+tune'"):
        prune(llama(), "wanda+distill+tune", **given)
    with pytest.raises(ZeroskipError, match="'distill' would move weights off their integers"):
        prune(llama(), "gptq+distill", pattern="unstructured", calibration=given["calibration"])
    with pytest.raises(ZeroskipError, match="needs data"):
        prune(llama(), "magnitude+distill", pattern="2:4")


def test_names():
    assert "obs+ls+tune+distill" in methods() and not any("distill+" in name for name in methods())
    assert Composition.parse("obs+distill").whole and not Composition.parse("obs+tune").whole


def test_the_command_line_keeps_the_model_in_memory_for_it(tmp_path):
    from safetensors.torch import save_file

    zeroskip.save(llama(), tmp_path / "dense")
    save_file({"input_ids": tokens(rows=8)}, tmp_path / "data.safetensors")
    options = ["--method", "wanda+distill", "--pattern", "2:4", "--calibration", str(tmp_path / "data.safetensors")]
    done = cli("prune", str(tmp_path / "dense"), str(tmp_path / "out"), *options, "--no-speed")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "distillation took" in report["rows"][0]["notes"][-1]
    again = zeroskip.load(tmp_path / "dense")
    prune(again, "wanda+distill", pattern="2:4", calibration=[{"input_ids": tokens(rows=8)}])
    stored = zeroskip.load(tmp_path / "out").state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in again.state_dict().items())
