"""`zs.compile` on tiny models with injected times: what is installed, what is refused, what is put back."""

from __future__ import annotations

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from planning import Net, inject, prefer, strips
from torch import nn

from zeroskip.bench import verdict
from zeroskip.compile import compile
from zeroskip.dense import DenseLinear, OneDnnLinear, onednn_problem
from zeroskip.errors import ZeroskipError
from zeroskip.install import apply_tuning, thaw
from zeroskip.model import find_sites
from zeroskip.nn import PackedLinear
from zeroskip.plan import Plan, plan_of
from zeroskip.planner import Planner
from zeroskip.tokens import Tokens

SPARSE = prefer("strip_nm")
X = torch.randn(6, 64, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool(((a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max()).item())


def test_compiled_equals_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    races = inject(monkeypatch, SPARSE, {"dense": 2.0, "compiled": 1.0})
    net = Net()
    want = net(X)
    assert compile(net, tokens=(1, 6), example_inputs=X) is net
    assert isinstance(net.first, PackedLinear) and isinstance(net.third, PackedLinear)
    assert type(net.second) is nn.Linear
    assert close(net(X), want)
    plan = plan_of(net)
    assert [site.name for site in plan.sites] == ["first", "second", "third"]
    first, second, third = plan.sites
    assert (first.pattern, first.sparsity, first.format, first.values) == ("8:16@64", 0.5, "strip_nm", "fp32")
    assert first.bytes_after < first.bytes_before == 64 * 128 * 4
    assert first.bytes_after == net.first.weight.nbytes == first.layout_bytes["strip_nm fp32"]
    assert "no sparse format holds this weight" in second.reason and second.pattern == "dense"
    assert third.measured_at == "first", "sites that share a key are measured once"
    assert len(races) == 2 * 2 + 1
    assert plan.checks[0].outcome == "kept" and plan.checks[0].ratios[0][0] == pytest.approx(2.0)
    assert "strip_nm fp32" in str(plan)


def test_an_unpruned_model_stays_dense_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, prefer("linear"))
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    before = list(net)
    compile(net, tokens=(4,), example_inputs=torch.randn(2, 64))
    assert all(now is then for now, then in zip(net, before, strict=True))
    plan = plan_of(net)
    assert all(site.reason.startswith("dense: linear fp32 is fastest; no sparse format") for site in plan.sites)
    assert plan.bytes_after == plan.bytes_before
    assert "nothing was replaced" in str(plan)


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


def test_without_inputs_the_whole_model_is_not_measured_and_the_plan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, SPARSE)
    net = compile(Net(), tokens=(1,))
    (check,) = plan_of(net).checks
    assert check.outcome == "skipped" and "example_inputs" in check.method


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


def test_bf16_model(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, SPARSE)
    net = Net(torch.bfloat16)
    want = net(X.bfloat16())
    compile(net, tokens=(1,), example_inputs=X.bfloat16())
    assert plan_of(net).sites[0].label == "strip_nm bf16"
    assert net(X.bfloat16()).dtype == torch.bfloat16 and close(net(X.bfloat16()), want, 0.05)


def test_fp16_weights_need_a_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, SPARSE)
    net = compile(Net(torch.float16), tokens=(1,))
    assert not plan_of(net).sites and "3 sites stay dense: their fp16 weights" in str(plan_of(net))
    want = net(X.half())
    compile(net, tokens=(1,), precision="fp32", example_inputs=X.half())
    assert plan_of(net).sites[0].label == "strip_nm fp32" and plan_of(net).sites[0].dtype == "fp16"
    assert net(X.half()).dtype == torch.float16 and close(net(X.half()), want, 0.02)


def test_a_kernel_that_fails_the_oracle_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    from zeroskip.bench import candidates

    monkeypatch.setattr(candidates._Forced, "forward", lambda self, x: torch.zeros(x.shape[0], self.m))
    inject(monkeypatch, SPARSE)
    with caplog.at_level(logging.ERROR):
        net = compile(Net(), tokens=(1,), example_inputs=X)
    assert plan_of(net).sites[0].label == "linear fp32"
    assert any("times the bound" in note for note in plan_of(net).notes)
    assert any("times the bound" in record.message for record in caplog.records)
    assert any("times the bound" in why for why in plan_of(net).sites[0].excluded.values())


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


def test_conv1d_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, SPARSE, {"dense": 2.0, "compiled": 1.0})
    model = tiny_models.gpt2()
    for site in find_sites(model):
        site.write(strips(site.weight()[0])[None])
    ids = tiny_models.tokens()
    want = model(ids).logits
    compile(model, tokens=(1, 8))
    plan = plan_of(model)
    assert {site.format for site in plan.sites} == {"strip_nm"} and len(plan.sites) == 8
    assert close(model(ids).logits, want)
    assert set(plan.checks[0].ratios) == {1, 8} and plan.checks[0].outcome == "kept"
    assert any("lm_head: stays dense, weight tied" in note for note in plan.notes)
    assert thaw(model) and close(model(ids).logits, want)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "t5", "bert"])
def test_transformers_models(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    inject(monkeypatch, SPARSE, {"dense": 1.0, "compiled": 1.0})
    model = getattr(tiny_models, kind)()
    for site in find_sites(model):
        site.write(strips(site.weight()[0])[None])
    batch = tiny_models.batches(kind, 1)[0]
    with torch.no_grad():
        want = model(**batch)[0]
        compile(model, tokens=(1, 8))
        assert plan_of(model).checks[0].outcome == "kept" and set(plan_of(model).checks[0].ratios) == {1, 8}
        assert any(site.is_packed for site in plan_of(model).sites)
        assert close(model(**batch)[0], want)


def test_a_module_under_two_names_is_replaced_under_both(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, SPARSE)
    shared = nn.Linear(64, 64)
    with torch.no_grad():
        shared.weight.copy_(strips(shared.weight))
    net = nn.ModuleList([shared, nn.Sequential(shared)])
    compile(net, tokens=(1,))
    assert isinstance(net[0], PackedLinear) and net[0] is net[1][0]


def test_under_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, SPARSE)
    net = Net()
    want = net(X)
    with torch.inference_mode():
        compile(net, tokens=(1,), example_inputs=X)
        assert close(net(X), want)
    assert not net.first.weight.is_inference()
    assert close(copy.deepcopy(net)(X), want)


def test_training_flags_survive(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, SPARSE)
    net = Net()
    net.second.eval()
    compile(net, tokens=(1,), example_inputs=X)
    assert net.training and not net.second.training


def test_bad_input() -> None:
    net = Net()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tokens": ()}, "tokens is empty"),
        ({"tokens": (0,)}, "at least 1"),
        ({"tokens": (-4,)}, "at least 1"),
        ({"precision": "int8"}, "low-bit"),
        ({"precision": "bf61"}, "did you mean 'bf16'"),
        ({"plan": 3}, "plan is a int"),
        ({"plan": "/nowhere/plan.json"}, "cannot read a plan"),
        ({"example_inputs": "text"}, "example_inputs is a str"),
        ({"example_inputs": torch.randn(2, 3)}, "does not run on example_inputs"),
    ]
    for arguments, message in cases:
        with pytest.raises(ZeroskipError, match=message):
            compile(net, **arguments)
    with pytest.raises(ZeroskipError, match="give an nn"):
        compile("a model")  # type: ignore[arg-type]
    with pytest.raises(ZeroskipError, match="0: the weight is on meta"):
        compile(nn.Sequential(nn.Linear(4, 4, device="meta")))
    with torch.no_grad():
        net.second.weight[0, 0] = float("nan")
    with pytest.raises(ZeroskipError, match="second: the weight holds NaN"):
        compile(net)
    assert type(net.first) is nn.Linear and not hasattr(net, "zeroskip_plan")


def test_nothing_to_compile() -> None:
    net = compile(nn.Sequential(nn.ReLU()))
    assert "no linear layers" in str(plan_of(net)) and isinstance(plan_of(net), Plan)


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
            site.write(strips(site.weight()[0])[None])
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
