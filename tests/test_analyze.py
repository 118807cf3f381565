"""`zs.analyze` with injected times, and the patterns it finds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from planning import Net, inject, prefer, strips
from torch import nn

from zeroskip.analyze import analyze
from zeroskip.compile import compile
from zeroskip.errors import ZeroskipError
from zeroskip.nn import PackedLinear
from zeroskip.planning.break_even import crossing
from zeroskip.planning.zeros import find_zeros
from zeroskip.prune import prune


def faster_when_sparser(name: str) -> float:
    """Synthetic weights are labelled by their sparsity: 2x the dense time when dense, none when empty."""
    label = name.partition("/")[0]
    return (
        2.0 * (1.0 - float(label)) if label.replace(".", "").isdigit() else 1.0 if label.startswith("linear") else 1.5
    )


def test_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, prefer("strip_nm", "0."))
    net = Net()
    before = copy.deepcopy(net.state_dict())
    seen: list[tuple[int, int]] = []
    answer = analyze(net, tokens=(1, 8), progress=lambda done, total, _: seen.append((done, total)))
    assert answer.advice.startswith("Compile it: 2 of 3 linear layers run faster sparse")
    assert answer.gains[1] == pytest.approx(3.0 / 1.2)
    assert [site.pattern for site in answer.sites] == ["8:16@64", "dense", "8:16@64"]
    assert answer.sites[0].speedups["strip_nm fp32"] == {1: pytest.approx(10.0), 8: pytest.approx(10.0)}
    text = str(answer)
    assert answer.advice.split(":")[0] in text and "strip_nm fp32*" in text and "8:16@64 50%" in text
    assert json.loads(json.dumps(answer.to_dict()))["advice"] == answer.advice
    assert seen[-1] == (5, 5) and len(seen) == 5
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert type(net.first) is nn.Linear and not hasattr(net, "zeroskip_plan")


def test_do_not_bother(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, faster_when_sparser)
    answer = analyze(Net(), tokens=(1,))
    assert answer.advice.startswith("Do not bother to compile it as it is: at 50% zeros (8:16@64)")
    points = answer.break_even["128x64 fp32"]
    assert points and all(point.sparsity == pytest.approx(0.5) for point in points)
    assert "N:16@64 zeros from 50% on (strip_nm)" in answer.advice
    assert {str(point) for point in points if point.pattern == "N:16@64"} == {"50%"}


@pytest.mark.parametrize("zeros", [True, False])
def test_dense_integers_of_a_solver_pay(monkeypatch: pytest.MonkeyPatch, zeros: bool) -> None:
    inject(monkeypatch, prefer("dense int4"))
    net = Net()
    if not zeros:
        for layer in (net.first, net.third):
            torch.nn.init.normal_(layer.weight)
    prune(net, "rtn", values="int4", group_size=32)
    answer = analyze(net, tokens=(1, 8))
    assert [site.label for site in answer.sites] == ["dense int4"] * 3
    assert answer.advice.startswith("Compile it: 3 of 3 linear layers run faster as dense integers")
    assert "10.00x at 1 token, 10.00x at 8 tokens" in answer.advice
    assert ("zeros gain nothing beyond that" in answer.advice) == zeros
    assert {name.split()[1] for name in answer.break_even} == {"int4"}


def test_no_zeros_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, prefer("linear"))
    answer = analyze(nn.Sequential(nn.Linear(64, 64)), tokens=(1,))
    assert "prune it first" in answer.advice and "at any sparsity tried" in answer.advice
    assert "> 9" in str(answer) or "> 8" in str(answer)


def test_nothing_to_analyze() -> None:
    assert "no linear layer" in str(analyze(nn.Sequential(nn.ReLU()), tokens=(1,)))


def test_a_compiled_model_is_analyzed_and_stays_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, prefer("strip_nm", "0."))
    net = compile(Net(), tokens=(1,))
    answer = analyze(net, tokens=(1,))
    assert isinstance(net.first, PackedLinear) and answer.sites[0].pattern == "8:16@64"


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ZeroskipError, match="budget_s is -1"):
        analyze(Net(), budget_s=-1)
    for model, message in ((3, "give an nn.Module or the path"), (tmp_path / "nowhere", "nowhere")):
        with pytest.raises(ZeroskipError, match=message):
            analyze(model, tokens=(1,))  # type: ignore[arg-type]
    with pytest.raises(ZeroskipError, match="tokens"):
        analyze(Net(), tokens=())


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ({0.5: 0.8, 0.7: 1.2}, 0.6),
        ({0.5: 1.1, 0.9: 3.0}, 0.5),
        ({0.5: 0.2, 0.9: 0.9}, None),
        ({0.5: 0.9, 0.7: 1.0}, 0.7),
    ],
)
def test_crossing(curve: dict[float, float], expected: float | None) -> None:
    assert crossing(curve) == (None if expected is None else pytest.approx(expected))


def _blocks(height: int, width: int) -> torch.Tensor:
    keep = torch.rand(128 // height, 128 // width, generator=torch.Generator().manual_seed(4)) < 0.5
    return torch.ones(128, 128) * keep.repeat_interleave(height, 0).repeat_interleave(width, 1)


def _unstructured(sparsity: float) -> torch.Tensor:
    return torch.ones(128, 128) * (torch.rand(128, 128, generator=torch.Generator().manual_seed(6)) >= sparsity)


CASES: dict[str, Any] = {
    "dense": [torch.ones(128, 128), _unstructured(0.01)],
    "unstructured": [_unstructured(s) for s in (0.3, 0.5, 0.9, 0.99)] + [torch.zeros(128, 128)],
    "8:16@64": [strips(torch.ones(128, 128)), strips(torch.ones(150, 64)), strips(torch.ones(128, 128)).bfloat16()],
    "8:16": [strips(torch.ones(128, 128), strip=1)],
    "2:4": [strips(torch.ones(128, 128), 2, 4, 1)],
    "2:4@16": [strips(torch.ones(128, 128), 2, 4, 16)],
    "1:4@32": [strips(torch.ones(128, 128), 1, 4, 32)],
    "block:16x1": [_blocks(16, 1)],
    "block:4x4": [_blocks(4, 4)],
    "block:1x16": [_blocks(1, 16)],
}


@pytest.mark.parametrize(("pattern", "weight"), [(name, weight) for name, each in CASES.items() for weight in each])
def test_find_zeros(pattern: str, weight: torch.Tensor) -> None:
    found = find_zeros(weight)
    assert found.pattern == pattern
    assert found.nnz == int((weight != 0).sum()) and found.sparsity == pytest.approx(1 - found.nnz / weight.numel())
