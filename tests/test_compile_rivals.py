"""`zs.compile` and its dense rivals, with injected times: each can win, and new ones compete at once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from planning import Net, X, close, inject, prefer
from torch import nn

from zeroskip.compile import compile
from zeroskip.dense_layers import DenseLinear, OneDnnLinear, onednn_problem
from zeroskip.nn import PackedLinear
from zeroskip.planning.plan import plan_of


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("label", "kind"), [("linear bf16", DenseLinear), ("onednn fp32", OneDnnLinear), ("dense bf16", PackedLinear)]
)
def test_dense_rivals_can_win(monkeypatch: pytest.MonkeyPatch, label: str, kind: type, tmp_path: Path) -> None:
    if label.startswith("onednn") and onednn_problem("fp32"):
        pytest.skip(onednn_problem("fp32") or "")
    inject(monkeypatch, prefer(label))
    net = Net()
    want = net(X)
    compile(net, tokens=(1, 6), precision="bf16", example_inputs=X)
    assert type(net.second) is kind and plan_of(net).sites[1].label == label
    tolerance = 0.05 if label.endswith("bf16") else 1e-5
    assert close(net(X), want, tolerance)
    got = net(X)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(X), got) and plan_of(twin) == plan_of(net)
    torch.save(net, tmp_path / "net.pt")
    assert torch.equal(torch.load(tmp_path / "net.pt", weights_only=False)(X), got)
    with torch.inference_mode():
        assert torch.equal(net(X), got)
    assert net(X.view(2, 3, 64)).shape == (2, 3, 128) and net(X[:0]).shape == (0, 128)
    state = net.state_dict()
    assert {"first.weight", "second.weight", "third.weight", "first.bias"} <= set(state)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(X), got)
    assert net.half()(X.half()).dtype == torch.float16


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_onednn_under_torch_compile(backend: str) -> None:
    if onednn_problem("fp32"):
        pytest.skip(onednn_problem("fp32") or "")
    layer = OneDnnLinear(torch.randn(32, 16), torch.randn(32), "fp32")
    x = torch.randn(5, 16)
    with torch.inference_mode():
        want = layer(x)
    with torch.no_grad():
        try:
            got = torch.compile(layer, fullgraph=True, backend=backend)(x)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            pytest.skip(f"no compiler: {str(error)[:80]}")
        assert close(got, want)
        assert close(torch.export.export(layer, (x,)).module()(x), want)


def test_a_new_rival_and_a_new_format_compete_without_a_change_to_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    from zeroskip.bench.dense import Rival
    from zeroskip.formats import base

    class Twice(Rival):
        name = "twice"

        @staticmethod
        def problem(values: str) -> str | None:
            return None

        @staticmethod
        def build(weight: torch.Tensor, bias: torch.Tensor | None, values: str, tokens: int) -> nn.Module:
            return DenseLinear.pack(weight, bias, values)

    registry = dict(base._registry)
    try:

        class Picky(base.Format):
            name = "picky"

            def accepts(self, weight: torch.Tensor) -> str | None:
                return "it never does"

            def pack(self, weight: torch.Tensor) -> torch.Tensor:
                raise NotImplementedError

            def unpack(self, header: Any, sections: list[torch.Tensor]) -> torch.Tensor:
                raise NotImplementedError

        inject(monkeypatch, prefer("twice"))
        net = compile(Net(), tokens=(1,), example_inputs=X)
    finally:
        base._registry.clear()
        base._registry.update(registry)
        del Rival.kinds["twice"]
    first = plan_of(net).sites[0]
    assert first.format == "twice" and isinstance(net.first, DenseLinear)
    assert first.excluded["picky fp32"] == "it never does"
