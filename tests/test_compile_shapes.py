"""Convolutions and recurrent layers through `zs.compile`: the same numbers, chosen, stored, loaded and put back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from planning import close, inject, prefer
from site_models import KINDS, correlated, make
from torch import nn

from zeroskip.analyze import analyze
from zeroskip.compile import compile
from zeroskip.conv_layers import PackedConv, geometry_of, geometry_problem
from zeroskip.errors import ZeroskipError
from zeroskip.formats import pack
from zeroskip.io import load, save
from zeroskip.model import find_sites
from zeroskip.nn import PackedLinear
from zeroskip.planning import measure, recurrent
from zeroskip.planning.install import thaw, weights_of
from zeroskip.planning.plan import Plan, plan_of
from zeroskip.recurrent_layers import SplitRecurrent, products

SPARSE = prefer("bitmask", "ours")
CONVS = [kind for kind in KINDS if kind.startswith("conv")]


def thin(model: nn.Module, zeros: float = 0.7) -> nn.Module:
    """Set part of every site's weights to zero."""
    draw = torch.Generator().manual_seed(1)
    for site in find_sites(model):
        weight = site.weight()
        site.write(weight * (torch.rand(weight.shape, generator=draw) >= zeros))
    return model


@torch.inference_mode()
@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_convolution_gives_what_torch_does(kind: str, dtype: torch.dtype) -> None:
    model, given = make(kind)
    conv = thin(model).layer.to(dtype)
    (site,) = find_sites(model)
    weight, bias = weights_of(site)
    x = given[0][0].to(dtype)
    want = conv.double()(x.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name in ("bitmask", "csr", "dense"):
        packed = PackedConv.of(conv, pack(weight, name, values="fp32" if dtype == torch.float32 else "bf16"), bias)
        assert packed(x).dtype == dtype and packed(x).shape == want.shape
        assert close(packed(x).double(), want, tolerance)
        assert close(packed(x[0]).double(), want[0], tolerance)
        if x.dim() == 4:
            assert close(packed(x.contiguous(memory_format=torch.channels_last)).double(), want, tolerance)
        assert packed(x[:0]).shape == (0, *want.shape[1:])
    assert geometry_problem(json.loads(json.dumps(geometry_of(packed)))) is None
    again = packed.dense(weight)
    assert torch.equal(again.weight, conv.weight.to(dtype)) and close(again(x).double(), want, tolerance)
    with pytest.raises(ZeroskipError, match="expected \\[batch"):
        packed(x[:, :-1])


@torch.inference_mode()
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("more", [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True, "bias": False}])
def test_a_recurrent_layer_taken_apart_gives_what_torch_does(kind: Any, more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    rnn = kind(6, 5, **more)
    split = SplitRecurrent(rnn, products(rnn))
    states = torch.randn(2, rnn.num_layers * (2 if rnn.bidirectional else 1), 4, 5)
    first = tuple(states) if rnn.mode == "LSTM" else states[0]
    for x, hx in ((torch.randn(4, 4, 6), None), (torch.randn(4, 4, 6), first), (torch.randn(7, 6), None)):
        for got, want in zip(_flat(split(x, hx)), _flat(rnn(x, hx)), strict=True):
            assert got.shape == want.shape and torch.allclose(got, want, atol=1e-6)
    back = split.dense({name: (part.weight, part.bias) for name, part in split.named_children()})
    assert type(back) is kind and torch.equal(back(x)[0], rnn(x)[0])
    with pytest.raises(ZeroskipError, match="PackedSequence"):
        split(nn.utils.rnn.pack_sequence([torch.randn(3, 6)]))
    with pytest.raises(ZeroskipError, match="expected \\[steps"):
        split(torch.randn(3, 4, 7))


def _flat(result: Any) -> list[torch.Tensor]:
    output, states = result
    return [output, *(states if isinstance(states, tuple) else (states,))]


class Mixed(nn.Module):
    """Convolutions, one in groups, a recurrent layer both ways, a head; and a depthwise one that is left alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(4, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)
        self.point, self.grouped = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.depth = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.rnn = nn.LSTM(32, 16, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.point(self.norm(self.first(x)).relu())
        x = self.depth(self.grouped(x)).mean(2).transpose(1, 2)
        y: torch.Tensor = self.head(self.rnn(x)[0])
        return y


X = correlated((3, 4, 8, 8), 0)


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Compiled, everything that can be is packed."""
    inject(monkeypatch, SPARSE, {"dense": 2.0, "compiled": 1.0})
    monkeypatch.setattr(recurrent, "race", measure.race)
    model = thin(Mixed().eval())
    assert compile(model, tokens=(1,), example_inputs=X) is model
    return model


def test_everything_is_packed_and_gives_the_same(mixed: nn.Module) -> None:
    want = thin(Mixed().eval())(X)
    assert isinstance(mixed.first, PackedConv) and isinstance(mixed.point, PackedConv)
    assert isinstance(mixed.rnn, SplitRecurrent) and isinstance(mixed.rnn.weight_hh_l0_reverse, PackedLinear)
    assert isinstance(mixed.grouped, PackedConv) and type(mixed.depth) is nn.Conv2d and type(mixed.head) is PackedLinear
    with torch.inference_mode():
        assert close(mixed(X), want, 1e-5)
    plan = plan_of(mixed)
    by_name = {site.name: site for site in plan.sites}
    assert list(by_name) == [
        "first", "point", "grouped", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.weight_ih_l0_reverse",
        "rnn.weight_hh_l0_reverse", "head",
    ]  # fmt: skip
    assert by_name["first"].shape == (32, 36) and by_name["first"].format == "bitmask"
    assert set(by_name["first"].speedups["channels_last fp32"]) == {3 * 4 * 4}, "positions of the output"
    assert set(by_name["rnn.weight_ih_l0"].speedups["bitmask fp32"]) == {3 * 4}
    assert set(by_name["rnn.weight_hh_l0"].speedups["bitmask fp32"]) == {3}
    assert "the whole layer is" in by_name["rnn.weight_ih_l0"].reason
    assert by_name["grouped"].shape == (32, 9 * 32) and by_name["grouped"].bytes_before == 32 * 8 * 9 * 4
    assert "it would multiply" in by_name["grouped"].excluded["dense fp32"]
    assert any("depth: stays dense, depthwise convolution" in note for note in plan.notes)
    assert "at 48" in str(plan)
    assert by_name["first"].bytes_after == mixed.first.weight.nbytes


def test_copies_and_graphs_of_a_compiled_model(mixed: nn.Module) -> None:
    want = mixed(X)
    assert torch.equal(copy.deepcopy(mixed)(X), want)
    torch._dynamo.reset()
    with torch.inference_mode():
        assert close(torch.compile(mixed, fullgraph=True, backend="aot_eager")(X), want, 1e-5)


def test_stored_loaded_and_put_back(mixed: nn.Module, tmp_path: Path) -> None:
    want = mixed(X)
    save(mixed, tmp_path / "m")
    again = load(tmp_path / "m", model=Mixed())
    assert isinstance(again.rnn, SplitRecurrent) and isinstance(again.first, PackedConv)
    assert torch.equal(again(X), want)
    save(again, tmp_path / "n")
    assert torch.equal(load(tmp_path / "n", model=Mixed())(X), want)
    assert thaw(again) == ["rnn", "first", "point", "grouped", "head"]
    assert type(again.rnn) is nn.LSTM and type(again.first) is nn.Conv2d
    pruned = thin(Mixed().eval())
    assert torch.equal(again.first.weight, pruned.first.weight)
    assert torch.equal(again.grouped.weight, pruned.grouped.weight) and again.grouped.groups == 4
    assert all(torch.equal(p, q) for p, q in zip(again.rnn.parameters(), pruned.rnn.parameters(), strict=True))
    assert close(again(X), want, 1e-5)


def test_a_plan_is_applied_without_measuring(mixed: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_of(mixed).save(tmp_path / "plan.json")
    monkeypatch.setattr(measure, "race", None)
    other = compile(thin(Mixed().eval()), tokens=(1,), plan=Plan.load(tmp_path / "plan.json"))
    assert isinstance(other.rnn, SplitRecurrent) and torch.equal(other(X), mixed(X))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"kernel_size": [3]}, "stride \\[2, 2\\] is not 1 whole numbers from 1 on"),
        ({"stride": [2, 0]}, "stride"),
        ({"groups": 1}, "groups 1 is not a whole number from 2 on"),
        ({"groups": 2}, "stored as convolution"),
        ({"padding_mode": "wild"}, "padding_mode 'wild' is not one of"),
        ({"stride": [1, 1]}, "stored as convolution"),
        (None, "conv is a NoneType"),
    ],
)
def test_edited_geometry_is_refused(mixed: nn.Module, tmp_path: Path, change: Any, problem: str) -> None:
    save(mixed, tmp_path / "m")
    path = tmp_path / "m" / "zeroskip.json"
    info = json.loads(path.read_text())
    info["sites"]["first"]["conv"] = change and info["sites"]["first"]["conv"] | change
    path.write_text(json.dumps(info))
    with pytest.raises(ZeroskipError, match=problem):
        load(tmp_path / "m", model=Mixed())


def test_dense_stays_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, prefer("linear", "torch"), {"dense": 2.0, "compiled": 1.0})
    monkeypatch.setattr(recurrent, "race", measure.race)
    model = compile(thin(Mixed().eval()), tokens=(1,), example_inputs=X)
    assert type(model.first) is nn.Conv2d and type(model.rnn) is nn.LSTM
    inject(monkeypatch, prefer("bitmask", "torch"), {"dense": 2.0, "compiled": 1.0})
    monkeypatch.setattr(recurrent, "race", measure.race)
    model = compile(thin(Mixed().eval()), tokens=(1,), example_inputs=X)
    assert isinstance(model.first, PackedConv) and type(model.rnn) is nn.LSTM
    reason = next(site.reason for site in plan_of(model).sites if "rnn" in site.name)
    assert "torch's own layer is faster than one step after another (0.20x)" in reason


def test_channels_last_is_installed_where_it_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inject(monkeypatch, prefer("channels_last"), {"dense": 2.0, "compiled": 1.0})
    model = compile(thin(Mixed().eval()), tokens=(1,), example_inputs=X)
    assert type(model.first) is nn.Conv2d and model.first.weight.is_contiguous(memory_format=torch.channels_last)
    assert close(model(X), thin(Mixed().eval())(X), 1e-5)
    save(model, tmp_path / "m")
    again = load(tmp_path / "m", model=Mixed())
    assert again.first.weight.is_contiguous(memory_format=torch.channels_last) and torch.equal(again(X), model(X))


def test_a_slower_model_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, SPARSE, {"dense": 1.0, "compiled": 2.0})
    monkeypatch.setattr(recurrent, "race", measure.race)
    model = thin(Mixed().eval())
    modules = list(model.modules())
    compile(model, tokens=(1,), example_inputs=X)
    assert list(model.modules()) == modules


def test_without_example_inputs_they_stay_and_the_plan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, SPARSE)
    model = compile(thin(Mixed().eval()), tokens=(1,))
    assert type(model.first) is nn.Conv2d and type(model.rnn) is nn.LSTM and isinstance(model.head, PackedLinear)
    notes = "\n".join(plan_of(model).notes)
    assert "first: stays dense, the size of its input is not known; give example_inputs" in notes


def test_analyze_lists_them(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, SPARSE)
    answer = analyze(thin(Mixed().eval()), tokens=(1,), example_inputs=X)
    text = str(answer)
    assert [site.name for site in answer.sites][:4] == ["first", "point", "grouped", "rnn.weight_ih_l0"]
    assert "channels_last fp32" in text and "at 48" in text
    assert list(answer.break_even) == ["64x32 fp32"]
