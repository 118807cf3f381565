"""Compile so that every row has the same bits whatever else is in the batch; which kernels can is in tests/kernels."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import holds
from planning import Net, X, inject, prefer
from torch import Tensor, nn

import zeroskip as zs
from zeroskip import ops
from zeroskip.conv_layers import PackedConv
from zeroskip.dense_layers import RowLinear, by_rows
from zeroskip.nn import PackedLinear
from zeroskip.planning import rows
from zeroskip.planning.install import apply_tuning
from zeroskip.planning.invariant import RowByRow, make_invariant
from zeroskip.planning.plan import Plan, plan_of
from zeroskip.planning.rows import is_invariant, pin, random_rows, steady_kernels

LOST = {"dense": 1.0, "compiled": 9.0}  # the whole model is slower


def test_trying_sees_company_and_places() -> None:
    x = random_rows(8, torch.float32)
    assert is_invariant(lambda x: x * 2, x)
    assert not is_invariant(lambda x: x + x.mean(), x)
    assert not is_invariant(lambda x: x * (1 + (len(x) == 13)), x), "every small number of rows"
    assert not is_invariant(lambda x: x * (1 + (len(x) == 256)), x)
    assert not is_invariant(lambda x: x + x.isnan().any(), x), "a row of NaN beside it"
    assert not is_invariant(lambda x: torch.zeros_like(x) * (1 if len(x) > 1 else -1), x), "the sign of a zero"


def test_rows_by_themselves() -> None:
    layer = nn.Linear(30, 7)
    seen: list[tuple[int, ...]] = []
    for shape in [(30,), (0, 30), (1, 30), (4, 30), (2, 3, 30), (2, 0, 30)]:
        x = torch.randn(shape)

        def call(row: Tensor) -> Tensor:
            seen.append(tuple(row.shape))
            y: Tensor = layer(row)
            return y

        y = by_rows(call, x)
        assert y.shape == (*shape[:-1], 7) and torch.allclose(y, layer(x), atol=1e-6)
    assert set(seen) == {(1, 30), (0, 30)}
    turned = torch.randn(30, 4).t()
    assert torch.equal(RowLinear.of(layer)(turned), RowLinear.of(layer)(turned.contiguous()))


def compiled(monkeypatch: pytest.MonkeyPatch, *wanted: str, **options: Any) -> Net:
    inject(monkeypatch, prefer(*wanted), LOST)
    net = zs.compile(Net(), tokens=(1, 6), example_inputs=X, batch_invariant=True, **options)
    assert isinstance(net, Net)
    return net


def test_torch_is_passed_over_and_the_plan_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    net = compiled(monkeypatch, "linear", "dense")
    plan = plan_of(net)
    assert plan.batch_invariant and plan.checks[0].outcome == "kept" and "kept all the same" in str(plan)
    for site in plan.sites:
        assert site.label == "dense fp32" and site.pinned and len(site.kernels) == 1
        assert site.passed_over["linear fp32"] == pytest.approx(2.0) and site.speedups["linear fp32"][1] == 2.0
        assert "passed over linear fp32 2.00x as fast" in site.reason
        assert getattr(net, site.name).kernel == site.kernels[0][1]
    assert "batch-invariant: one kernel" in str(plan)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    x = torch.randn(40, 64)
    assert holds(net, x) and torch.equal(torch.compile(net, backend="aot_eager", fullgraph=True)(x), net(x))
    want = net(x)
    zs.save(net, tmp_path / "out")
    again = zs.load(tmp_path / "out", model=Net())
    applied = zs.compile(Net(), tokens=(1, 6), plan=plan)
    for other in (again, applied, copy.deepcopy(net)):
        assert torch.equal(other(x), want) and plan_of(other).batch_invariant
        assert other.first.kernel == net.first.kernel
    # Another model of the same shapes may tune the table of the process as it likes.
    ops.tune(net.first.packed, [(None, ops.kernels(net.first.packed)[-1])])
    assert torch.equal(net(x), want)


def test_a_sparse_layout_is_taken_only_if_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    net = compiled(monkeypatch, "bitmask", "dense")
    site = plan_of(net).sites[0]
    weight = Net().first.weight.detach()
    steady = steady_kernels(zs.pack(weight, "bitmask"), torch.float32)
    assert site.format == ("bitmask" if steady else "dense")
    assert ("bitmask fp32" in site.passed_over) == (not steady)
    strip = compiled(monkeypatch, "strip_nm")
    site = plan_of(strip).sites[0]
    assert site.format == "strip_nm" and not site.passed_over and "it costs nothing here" in site.reason
    assert holds(net, torch.randn(30, 64)) and holds(strip, torch.randn(30, 64))


def test_elsewhere_the_kernel_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net = compiled(monkeypatch, "dense")
    plan = copy.deepcopy(plan_of(net))
    for site in plan.sites:
        site.kernels = [(None, "spmm_dense_fp32_of_another_row")]
    net.first.kernel = None
    apply_tuning(net, plan)
    assert net.first.kernel in ops.kernels(net.first.packed) and holds(net, torch.randn(30, 64))
    for kernels in ([], [(4, "a"), (None, "b")]):
        damaged = copy.deepcopy(plan)
        damaged.sites[0].kernels = kernels
        with pytest.raises(zs.ZeroskipError, match=f"with {len(kernels)} kernels: compile it again"):
            apply_tuning(net, damaged)
    with pytest.raises(zs.ZeroskipError, match="there is no kernel 'spmm_dense_fp32_of_another_row'"):
        zs.compile(Net(), tokens=(1, 6), plan=plan)


class Tied(nn.Module):
    """A head that shares its weight with a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.inner(self.table(ids)))
        return y


def test_a_tied_head_works_row_by_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inject(monkeypatch, prefer("dense"), LOST)
    ids = torch.arange(40)
    net = zs.compile(Tied(), tokens=(1,), example_inputs=ids, batch_invariant=True)
    assert type(net.head) is RowLinear and net.head.weight is net.table.weight and isinstance(net.inner, PackedLinear)
    assert plan_of(net).rows == ["head"] and "1 layers of torch work row by row" in str(plan_of(net))
    want = torch.cat([net(one) for one in ids.split(1)])
    assert torch.equal(net(ids), want) and torch.equal(net(ids.view(4, 10)).view(40, 50), want)
    zs.save(net, tmp_path / "out")
    again = zs.load(tmp_path / "out", model=Tied())
    assert type(again.head) is RowLinear and torch.equal(again(ids), want)
    assert type(zs.compile(Tied(), plan=plan_of(net)).head) is RowLinear
    inject(monkeypatch, prefer("linear"), LOST)
    plain = zs.compile(net, tokens=(1,), example_inputs=ids)
    assert type(plain.head) is nn.Linear and plain.head.weight is plain.table.weight and not plan_of(plain).rows


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_has_positions_for_rows(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, prefer("channels_last", "dense"), LOST)
    x = torch.randn(6, 8, 9, 9)
    conv = nn.Conv2d(8, 32, 3, groups=groups)
    net = zs.compile(nn.Sequential(conv), tokens=(1,), example_inputs=x, batch_invariant=True)
    assert isinstance(net[0], PackedConv) and net[0].kernel is not None
    want = torch.cat([net(one) for one in x.split(1)])
    assert torch.equal(net(x), want)


def refused() -> list[tuple[nn.Module, Tensor, str]]:
    hooked = nn.Sequential(nn.Linear(64, 64))
    hooked[0].register_forward_hook(lambda *_: None)
    x = torch.randn(3, 5, 64)
    return [
        (nn.Sequential(nn.LSTM(64, 64)), x, r"0\.weight_.*this LSTM"),
        (nn.TransformerEncoderLayer(64, 4, 64, batch_first=True), x, "self_attn.*MultiheadAttention"),
        (nn.Sequential(nn.Conv1d(64, 64, 3, groups=64)), torch.randn(2, 64, 9), "this Conv1d"),
        (hooked, x, "this Linear"),
    ]


@pytest.mark.parametrize("number", range(len(refused())))
def test_layers_whose_rows_cannot_be_held_are_refused(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, prefer("dense"))
    model, x, message = refused()[number]
    before = list(model.modules())
    with pytest.raises(zs.ZeroskipError, match=f"{message}; compile without it"):
        zs.compile(model, tokens=(1,), example_inputs=x, batch_invariant=True)
    assert list(model.modules()) == before


def test_a_plan_without_it_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, prefer("dense"))
    plan = plan_of(zs.compile(Net(), tokens=(1,)))
    assert not plan.batch_invariant and not any(site.pinned for site in plan.sites)
    with pytest.raises(zs.ZeroskipError, match="made without batch_invariant"):
        zs.compile(Net(), plan=plan, batch_invariant=True)


def test_a_model_that_does_not_run_packed_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x) @ self.layer.weight
            return y

    inject(monkeypatch, prefer("dense"))
    model = Reads()
    with pytest.raises(zs.ZeroskipError, match="does not run with packed layers"):
        zs.compile(model, tokens=(1,), example_inputs=X, batch_invariant=True)
    assert type(model.layer) is nn.Linear


def test_no_steady_dense_kernel_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, prefer("dense"))
    monkeypatch.setattr(rows, "is_invariant", lambda *_: False)
    with pytest.raises(zs.ZeroskipError, match="no dense kernel here gives a row the same bits"):
        zs.compile(Net(), tokens=(1,), batch_invariant=True)


def test_a_model_that_exists_is_made_invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = nn.Conv2d(16, 32, 3)
    packed = PackedConv.of(conv, zs.pack(conv.weight.detach().permute(0, 2, 3, 1).reshape(32, -1), "dense"), None)
    net = nn.Sequential(packed, nn.Flatten(), nn.Linear(32, 8, dtype=torch.bfloat16))
    assert make_invariant(net) == {"as they are": 1, "row by row": 1}
    assert net[0] is packed and isinstance(net[2], RowByRow), "in half precision torch's layers are not trusted"
    x = torch.randn(5, 16, 3, 3)
    assert torch.equal(packed(x), torch.cat([packed(one) for one in x.split(1)]))
    monkeypatch.setattr(rows, "is_invariant", lambda *_: False)
    monkeypatch.setattr("zeroskip.planning.invariant.is_invariant", lambda *_: False)
    with pytest.raises(zs.ZeroskipError, match="0: no kernel holds the rows of this packed convolution"):
        make_invariant(net)
    layer = PackedLinear.from_packed(zs.pack(torch.randn(8, 16), "dense"))
    assert not pin(layer, torch.float32) and layer.kernel is None
