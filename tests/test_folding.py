"""Activations folded into the layer before them: found only where nothing else reads, and undone without a trace."""

import copy

import pytest
import torch
from planning import SPARSE, close, inject, strips
from torch import nn
from torch.nn import functional

import zeroskip as zs
from zeroskip.errors import ZeroskipError
from zeroskip.nn import PackedLinear
from zeroskip.planning.folding import Done, find_foldable, fold, known_as, unfold
from zeroskip.planning.install import thaw
from zeroskip.planning.plan import Folded, Plan, plan_of

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def packed(m=64, k=64, seed=0, bias=True):
    generator = torch.Generator().manual_seed(seed)
    weight = strips(torch.randn(m, k, generator=generator))
    return PackedLinear.from_packed(zs.pack(weight, "strip_nm"), torch.randn(m, generator=generator) if bias else None)


class Mlp(nn.Module):
    """An MLP whose forward is given."""

    def __init__(self, forward, activation=None):
        super().__init__()
        self.up, self.down, self.gate = packed(seed=1), packed(seed=2), packed(seed=3, bias=False)
        self.act, self.run = activation or nn.GELU(), forward

    def forward(self, x):
        return self.run(self, x)


def test_modules_are_known_by_what_they_compute():
    from transformers.activations import ACT2FN

    want = {"gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh"}
    want |= {"gelu_pytorch_tanh": "gelu_tanh", "silu": "silu", "swish": "silu", "relu": "relu", "relu2": "relu2"}
    others = dict.fromkeys(["quick_gelu", "gelu_10", "relu6", "tanh", "mish", "leaky_relu", "linear", "sigmoid"])
    for name, known in (want | others).items():
        assert known_as(ACT2FN[name]) == known, name
    learned = nn.PReLU()
    wide = nn.Linear(1, 1)
    assert [known_as(each) for each in (learned, wide, nn.Softmax(-1), nn.Dropout(), nn.ReLU())] == [None] * 4 + [
        "relu"
    ]


class Shifting(nn.Module):
    """ReLU but for the last value it is given: no function of each value by itself."""

    def forward(self, x):
        y = functional.relu(x)
        y[..., -1] = 0
        return y


@pytest.mark.parametrize("activation", [Shifting(), nn.Tanh(), nn.Identity(), nn.Dropout()])
def test_other_modules_stay(activation):
    model = Mlp(lambda self, x: self.down(self.act(self.up(x))), activation).eval()
    assert find_foldable(model, lambda: model(X)) == []


KINDS = [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.ReLU()]


@pytest.mark.parametrize("activation", KINDS, ids=["gelu", "gelu_tanh", "silu", "relu"])
@pytest.mark.parametrize("gated", [False, True])
def test_a_folded_model_computes_the_same(activation, gated):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x) if gated else self.act(self.up(x)))

    model = Mlp(forward, activation)
    want = model(X)
    pairs = find_foldable(model, lambda: model(X))
    assert [(pair.layer, pair.activation) for pair in pairs] == [("gate" if gated else "up", "act")]
    assert model.act is activation  # finding changes nothing
    assert [name for name, _, _ in fold(model, pairs)] == ["act"]
    assert isinstance(model.act, Done) and close(model(X), want, 2e-6)
    assert fold(model, pairs) == []  # not twice
    twin = copy.deepcopy(model)
    unfold(model, model.gate if gated else model.up)
    assert model.act is activation and torch.equal(model(X), want)
    assert isinstance(twin.act, Done) and close(twin(X), want, 2e-6)  # a copy has its own
    unfold(twin, twin.gate if gated else twin.up)
    assert torch.equal(twin(X), want)


def residual(self, x):
    h = self.up(x)
    return self.act(h) + h


def late(self, x):
    h = self.up(x)
    y = self.act(h)
    return y + h.mean()


def seen(self, x):
    h = self.up(x)
    view = h[:, :8]
    return self.act(h), view


def given(self, x):
    h = self.up(x)
    return {"out": self.act(h), "before": h}


def changed(self, x):
    h = self.up(x)
    h += 1
    return self.act(h)


def twice(self, x):
    return self.act(self.up(self.act(self.up(x))))


def shared(self, x):
    return self.act(self.up(x)) + self.act(self.gate(x))


def reshaped(self, x):
    return self.act(self.up(x).view(-1))


def decided(self, x):
    h = self.up(x)
    return self.act(h) if h.sum().item() < 1e9 else h


@pytest.mark.parametrize(
    "forward", [residual, late, seen, given, changed, twice, shared, reshaped, decided], ids=lambda f: f.__name__
)
def test_what_something_else_reads_is_left_alone(forward):
    model = Mlp(forward)
    assert find_foldable(model, lambda: model(X)) == []


def test_a_module_of_two_names_or_with_hooks_or_of_another_parent_stays():
    model = Mlp(lambda self, x: self.down(self.act(self.up(x))))
    model.also = model.act
    assert find_foldable(model, lambda: model(X)) == []
    del model.also
    assert len(find_foldable(model, lambda: model(X))) == 1
    hook = model.act.register_forward_hook(lambda *_: None)
    assert find_foldable(model, lambda: model(X)) == []
    hook.remove()
    inner = nn.Sequential(packed())
    outer = nn.Sequential(inner, nn.GELU())
    assert find_foldable(outer, lambda: outer(X)) == []


def test_a_forward_that_fails_leaves_no_hooks():
    model = Mlp(lambda self, x: self.act(self.up(x)) @ x)
    with pytest.raises(RuntimeError):
        find_foldable(model, lambda: model(X))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.act, self.down = nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)
        with torch.no_grad():
            self.up.weight.copy_(strips(self.up.weight))
            self.down.weight.copy_(strips(self.down.weight))

    def forward(self, x):
        return self.down(self.act(self.up(x)))


@pytest.fixture
def compiled(monkeypatch):
    inject(monkeypatch, SPARSE, {"dense": 1.0, "compiled": 0.5})
    net = Net().eval()
    want = net(X)
    return zs.compile(net, tokens=(1, 6), example_inputs=X, precision="fp32"), want


def test_compile_folds_stores_and_thaws(compiled, tmp_path, monkeypatch):
    net, want = compiled
    plan = plan_of(net)
    assert [(each.layer, each.activation, each.function) for each in plan.folded] == [("up", "act", "gelu")]
    assert isinstance(net.act, Done) and close(net(X), want, 1e-5)
    assert "1 activations (gelu) are computed" in str(plan)
    assert Plan.from_dict(plan.to_dict()).folded == plan.folded
    zs.save(net, tmp_path / "m")
    again = zs.load(tmp_path / "m", model=Net())
    assert isinstance(again.act, Done) and torch.equal(again(X), net(X))
    zs.save(again, tmp_path / "n")
    for file in ("model.safetensors",):
        assert (tmp_path / "m" / file).read_bytes() == (tmp_path / "n" / file).read_bytes()
    thaw(again)
    assert type(again.act) is nn.GELU and close(again(X), want, 1e-5)
    twin = zs.compile(Net().eval(), tokens=(1, 6), plan=plan)
    assert isinstance(twin.act, Done) and torch.equal(twin(X), net(X))


def test_a_model_put_back_has_its_activation_again(monkeypatch):
    inject(monkeypatch, SPARSE, {"dense": 1.0, "compiled": 2.0})
    net = Net().eval()
    want, activation = net(X), net.act
    zs.compile(net, tokens=(1, 6), example_inputs=X, precision="fp32")
    assert plan_of(net).folded == [] and net.act is activation and torch.equal(net(X), want)


def test_a_stored_pair_that_does_not_fit_is_not_believed(compiled):
    net, want = compiled
    thaw(net)
    for pair in (Folded("up", "act", "silu"), Folded("up", "gone", "gelu"), Folded("no.such", "act", "gelu")):
        assert fold(net, [pair]) == []
    assert close(net(X), want, 1e-5)
    data = {"layer": "up", "activation": "act", "function": "exp"}
    with pytest.raises(ValueError, match="exp"):
        Folded.from_dict(data)
    plan = plan_of(net).to_dict() | {"folded": [data]}
    with pytest.raises(ZeroskipError, match="damaged"):
        Plan.from_dict(plan)
