"""`zs.compile` on tiny models with injected times: what is installed, what is refused."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from planning import SPARSE, Net, X, close, inject, prefer, strips
from torch import nn

from zeroskip.compile import compile
from zeroskip.errors import ZeroskipError
from zeroskip.formats import unpack
from zeroskip.io import load, save
from zeroskip.model import find_sites
from zeroskip.nn import PackedLinear
from zeroskip.planning.install import thaw
from zeroskip.planning.plan import Plan, plan_of
from zeroskip.prune import prune


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def test_codes_of_a_solver_are_packed_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, prefer("dense int4"), {"dense": 2.0, "compiled": 1.0})
    net = Net()
    prune(net, "sparsegpt+gptq", sparsity=0.5, values="int4", group_size=32, calibration=[X])
    rounded = {site.name: site.weight()[0].clone() for site in find_sites(net)}
    compile(net, tokens=(1, 6), precision="int4", example_inputs=X)
    for name, weight in rounded.items():
        packed = getattr(net, name).packed
        assert packed.group_size == 32 and torch.equal(unpack(packed), weight)


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("wanted", ["dense", "bitmask"])
def test_codes_of_a_solver_compete_by_themselves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wanted: str, values: str
) -> None:
    inject(monkeypatch, prefer(f"{wanted} {values}"), {"dense": 2.0, "compiled": 1.0})
    model = tiny_models.llama(torch.bfloat16, layers=1)
    given = tiny_models.batches("llama", 1)
    prune(model, "sparsegpt+gptq", sparsity=0.5, values=values, group_size=32, calibration=given)
    save(model, tmp_path / "rounded")
    loaded = load(tmp_path / "rounded")
    rounded = {site.name: (site.weight()[0].clone(), site.scales[0]) for site in find_sites(loaded)}
    compile(loaded, tokens=(1, 8))
    for name, (weight, scales) in rounded.items():
        packed = loaded.get_submodule(name).packed
        assert (packed.format, packed.values, packed.group_size) == (wanted, values, 32)
        assert torch.equal(unpack(packed).to(torch.bfloat16), weight) and torch.equal(packed.scales, scales)
    kinds = {label.split()[1] for label in plan_of(loaded).sites[0].times_ms}
    assert kinds == {"bf16", *(("int8", "int4") if values == "int4" else ("int8",))}, "4-bit codes fit 8 bits too"


def test_a_site_that_was_trained_on_is_not_rounded_behind_the_users_back(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, prefer("dense int4", "dense int8"), {"dense": 2.0, "compiled": 1.0})
    net = Net()
    prune(net, "sparsegpt+gptq", sparsity=0.5, values="int4", group_size=32, calibration=[X])
    with torch.no_grad():
        net.first.weight.mul_(1.01 + 0.1 * torch.rand_like(net.first.weight))
    compile(net, tokens=(1, 6), example_inputs=X)
    assert {site.name: site.values for site in plan_of(net).sites} == {
        "first": "fp32",
        "second": "int4",
        "third": "int4",
    }


@pytest.mark.parametrize("precision", [None, "int8", "int4"])
def test_a_head_of_8_bits_is_not_rounded_once_more(monkeypatch: pytest.MonkeyPatch, precision: str | None) -> None:
    inject(monkeypatch, prefer("dense int4", "dense int8"), {"dense": 2.0, "compiled": 1.0})
    net = Net()
    rules = [{"include": "third", "method": "rtn", "values": "int8"}]
    recipe = {"method": "sparsegpt+gptq", "sparsity": 0.5, "values": "int4", "group_size": 32, "rules": rules}
    prune(net, recipe=recipe, calibration=[X])
    head = net.third.weight.detach().clone()
    compile(net, tokens=(1, 6), precision=precision, example_inputs=X)
    assert [site.values for site in plan_of(net).sites] == ["int4", "int4", "int8"]
    assert torch.equal(unpack(net.third.packed), head)


def test_half_precision_needs_no_precision_for_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, prefer("bitmask int4"), {"dense": 2.0, "compiled": 1.0})
    net = Net()
    prune(net, "sparsegpt+gptq", sparsity=0.5, values="int4", group_size=32, calibration=[X])
    compile(net.half(), tokens=(1, 6), example_inputs=X.half())
    assert [site.label for site in plan_of(net).sites] == ["bitmask int4"] * 3
    assert bool(torch.isfinite(net(X.half())).all())


def test_integers_compete_where_they_were_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inject(monkeypatch, prefer("dense int4"), {"dense": 2.0, "compiled": 1.0})
    net = compile(Net(), tokens=(1, 6), precision="int4", example_inputs=X)
    plan = plan_of(net)
    assert [site.label for site in plan.sites] == ["dense int4"] * 3
    assert {"dense int8", "dense int4", "dense bf16", "strip_nm fp32"} <= set(plan.sites[0].times_ms)
    assert "stores no int4" in plan.sites[0].excluded["strip_nm int4"]
    want = Net()
    for name in ("first", "second", "third"):
        weight = unpack(getattr(net, name).packed)
        assert weight.dtype == torch.float32 and not torch.equal(weight, getattr(want, name).weight)
        getattr(want, name).weight.data = weight
    assert close(net(X), want(X), 0.02)  # activations are rounded to 127 steps
    save(net, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out", model=Net())(X), net(X))


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


def test_without_inputs_the_whole_model_is_not_measured_and_the_plan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, SPARSE)
    net = compile(Net(), tokens=(1,))
    (check,) = plan_of(net).checks
    assert check.outcome == "skipped" and "example_inputs" in check.method


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
    from zeroskip.planning import candidates

    monkeypatch.setattr(candidates._Forced, "forward", lambda self, x: torch.zeros(x.shape[0], self.m))
    inject(monkeypatch, SPARSE)
    with caplog.at_level(logging.ERROR):
        net = compile(Net(), tokens=(1,), example_inputs=X)
    assert plan_of(net).sites[0].label == "linear fp32"
    assert any("times the bound" in note for note in plan_of(net).notes)
    assert any("times the bound" in record.message for record in caplog.records)
    assert any("times the bound" in why for why in plan_of(net).sites[0].excluded.values())


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
        ({"tokens": (1, 10**15)}, "tokens holds 1000000000000000: measuring first with so many takes .* are free"),
        ({"precision": "bf61"}, "did you mean 'bf16'"),
        ({"plan": 3}, "plan is a int"),
        ({"plan": "/nowhere/plan.json"}, "cannot read a plan"),
        ({"budget_s": float("nan")}, "budget_s is nan: give seconds above 0"),
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


def test_weights_without_kernels_stay_dense() -> None:
    net = compile(nn.Sequential(nn.Linear(16, 16)).to(torch.float8_e4m3fn))
    assert "float8_e4m3fn weights have no kernels" in str(plan_of(net))


def test_nothing_to_compile() -> None:
    net = compile(nn.Sequential(nn.ReLU()))
    assert "no linear layers" in str(plan_of(net)) and isinstance(plan_of(net), Plan)
