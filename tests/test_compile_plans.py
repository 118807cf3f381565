"""`zs.compile`: plans used again, models put back, layers that have to stay as they are; times are injected."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from planning import SPARSE, Net, X, close, inject, prefer, strips
from torch import nn

import zeroskip as zs
from zeroskip.compile import compile
from zeroskip.dense_layers import DenseLinear
from zeroskip.errors import ZeroskipError
from zeroskip.model import Site, find_sites
from zeroskip.nn import PackedLinear
from zeroskip.planning import verdict
from zeroskip.planning.install import apply_tuning, build
from zeroskip.planning.plan import plan_of
from zeroskip.planning.planner import Planner
from zeroskip.planning.tokens import Tokens


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_slower_model_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, SPARSE, {"dense": 1.0, "compiled": 1.1})
    net = Net()
    before = dict(net.named_modules())
    compile(net, tokens=(1,), example_inputs=X)
    assert dict(net.named_modules()) == before
    plan = plan_of(net)
    assert plan.checks[0].outcome == "put back"
    assert plan.sites[0].label == "linear fp32" and plan.sites[0].reason.startswith("put back: the model as a whole")
    assert plan.bytes_after == plan.bytes_before


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_a_large_model_is_put_back_without_its_dense_self(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    times = {"model": iter([1.0, 2.0])}  # before packing, after: the control stays the same
    inject(monkeypatch, prefer("strip_nm bf16" if precision else "strip_nm"))
    monkeypatch.setattr(verdict, "KEEP_BOTH", 0.0)
    monkeypatch.setattr(verdict, "with_control", lambda calls, _: {t: _control(next(times["model"])) for t in calls})
    net = Net()
    want = net.first.weight.detach().clone()
    compile(net, tokens=(1,), precision=precision, example_inputs=X)
    assert plan_of(net).checks[0].outcome == "put back"
    assert type(net.first) is nn.Linear and net.first.weight.dtype == torch.float32
    rounded = want.bfloat16().float() if precision else want
    assert torch.equal(net.first.weight, rounded)


def _control(seconds: float) -> Any:
    from zeroskip.bench.timer import Race

    return Race({"model": [seconds] * 5, "control": [1.0] * 5}, rounds=5)


def test_a_failure_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, SPARSE)
    net = Net()
    before = dict(net.named_modules())

    def stop(done: int, total: int, name: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile(net, tokens=(1,), progress=stop)
    assert dict(net.named_modules()) == before and not hasattr(net, "zeroskip_plan")


def test_a_plan_is_applied_without_measuring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inject(monkeypatch, SPARSE)
    plan = plan_of(compile(Net(), tokens=(1, 6)))
    plan.save(tmp_path / "plan.json")
    races = inject(monkeypatch, prefer("linear"))
    for given in (plan, plan.to_dict(), tmp_path / "plan.json", str(tmp_path / "plan.json")):
        net = Net()
        want = net(X)
        compile(net, plan=given)
        assert not races and isinstance(net.first, PackedLinear) and close(net(X), want)
        assert plan_of(net).sites == plan.sites and plan_of(net) is not plan


def test_a_plan_of_another_machine_is_measured_again(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    inject(monkeypatch, SPARSE)
    plan = plan_of(compile(Net(), tokens=(1,)))
    other = dataclasses.replace(plan, machine=dataclasses.replace(plan.machine, cpu="a faster one"))
    races = inject(monkeypatch, prefer("linear"))
    with caplog.at_level(logging.WARNING):
        net = compile(Net(), tokens=(1,), plan=other)
    assert races and type(net.first) is nn.Linear
    assert any("another machine (cpu a faster one" in record.message for record in caplog.records)
    assert any("another machine" in note for note in plan_of(net).notes)


def test_a_plan_of_another_model_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, SPARSE)
    plan = plan_of(compile(Net(), tokens=(1,)))
    strange = [
        (dataclasses.replace(plan.sites[0], name="frist"), "did you mean 'first'"),
        (dataclasses.replace(plan.sites[0], shape=(128, 32)), "128x64 fp32, the plan says 128x32"),
        (dataclasses.replace(plan.sites[0], dtype="bf16"), "the plan says 128x64 bf16"),
    ]
    for site, message in strange:
        net = Net()
        with pytest.raises(ZeroskipError, match=message):
            compile(net, plan=dataclasses.replace(plan, sites=[site]))
    dense = Net()
    nn.init.normal_(dense.first.weight)
    with pytest.raises(ZeroskipError, match=r"first: the plan's strip_nm fp32 does not fit"):
        compile(dense, plan=plan)
    assert type(dense.third) is nn.Linear


def test_a_compiled_model_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, SPARSE)
    net = compile(Net(), tokens=(1,))
    want = net(X)
    inject(monkeypatch, prefer("linear"))
    compile(net, tokens=(1,))
    assert type(net.first) is nn.Linear and close(net(X), want)


def test_loading_sets_up_what_the_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, prefer("linear bf16"))
    net = compile(Net(), tokens=(1,), precision="bf16")
    plan, want = plan_of(net), net(X)
    loaded = Net()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            owner, _, leaf = name.rpartition(".")
            setattr(loaded.get_submodule(owner), leaf, nn.Parameter(parameter.clone(), requires_grad=False))
    apply_tuning(loaded, plan)
    assert type(loaded.first) is DenseLinear and torch.equal(loaded(X), want)


def test_layers_that_others_read_directly_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, SPARSE)

    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    hooked = nn.Linear(64, 64)
    hooked.register_forward_hook(lambda *_: None)
    net = nn.ModuleList(
        [nn.TransformerEncoderLayer(64, 4, 64, batch_first=True), Own(64, 64), hooked, nn.Linear(64, 64)]
    )
    with torch.no_grad():
        for site in find_sites(net):
            site.write(torch.stack([strips(matrix) for matrix in site.weight()]))
    net.eval()
    x = torch.randn(2, 3, 64)
    with torch.inference_mode():
        want = net[0](x)
        compile(net, tokens=(1,))
        assert close(net[0](x), want)
    assert [site.name for site in plan_of(net).sites] == ["3"] and isinstance(net[3], PackedLinear)
    notes = str(plan_of(net))
    assert "reads its weight directly" in notes and "Own computes in a way of its own" in notes and "hooks" in notes


def test_a_model_that_does_not_run_packed_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, SPARSE)

    class Nosy(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.first.weight.t()

    net = compile(Nosy(), tokens=(1,), example_inputs=X)
    assert type(net.first) is nn.Linear and net(X).shape == (6, 128)
    assert "put back: does not run with packed layers" in plan_of(net).sites[0].reason


def test_a_busy_machine_is_noted() -> None:
    planner = Planner(Tokens((1,)), None, 0, 0.1)
    assert planner.unrest() is None
    planner.spreads = [0.02, 0.03, 0.9]
    assert planner.unrest() is None
    planner.spreads = [0.4, 0.5, 0.02]
    assert "spans 40% of the median" in (planner.unrest() or "")


def test_a_model_under_torch_compile_is_compared_under_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both sides of the check run what torch.compile made; "eager" as its backend spares the test the C++ compiler."""
    ran: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        ran.append("packed" if any("zeroskip.linear" in str(node.target) for node in graph.graph.nodes) else "dense")
        return graph.forward

    inject(monkeypatch, SPARSE, {"dense": 1.0, "compiled": 0.5})
    net = Net()
    want = net(X)
    wrapped = torch.compile(net, backend=backend)
    assert compile(wrapped, tokens=(1,), example_inputs=X) is wrapped
    assert set(ran) == {"dense", "packed"}
    check = plan_of(wrapped).checks[0]
    assert (check.mode, check.outcome) == ("compiled", "kept") and "(compiled)" in str(check)
    assert [site.name for site in plan_of(net).sites] == ["first", "second", "third"]
    with torch.inference_mode():
        assert close(wrapped(X), want)
    zs.save(wrapped, tmp_path / "stored")
    with torch.inference_mode():
        assert close(zs.load(tmp_path / "stored", Net())(X), want)


def test_a_model_compiled_in_place_is_compared_under_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, SPARSE, {"dense": 1.0, "compiled": 1.5})
    net = Net()
    net.compile(backend="eager")
    compile(net, tokens=(1,), example_inputs=X)
    assert (plan_of(net).checks[0].mode, plan_of(net).checks[0].outcome) == ("compiled", "put back")


def test_zeros_that_are_alike_in_number_may_need_another_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix whose scattered zeros happen to leave strips without a column, beside one that has no such strip."""
    inject(monkeypatch, SPARSE)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Linear(64, 128, bias=False))
    for layer, one in zip(model, (0, 1), strict=True):
        keep = torch.rand(128, 64) > 0.5
        keep[:, ::8] = False  # one input of eight is left out by every row
        if one:  # as many zeros, but every strip of 16 rows uses every input
            keep[::16, ::8] = True
            taken = keep[:, 2::8].nonzero()[:64]
            keep[taken[:, 0], 2 + 8 * taken[:, 1]] = False
        layer.weight.data *= keep
    sites = [Site(str(i), layer) for i, layer in enumerate(model)]
    planner = Planner(Tokens((4,)), None, 0, 0.1)
    notes: list[str] = []
    first, second = (planner.plan(site, notes) for site in sites)
    assert first.format == "strip_nm" and second.format != "strip_nm"
    assert [type(build(plan, site, 4)).__name__ for plan, site in zip((first, second), sites, strict=True)]
