"""Compile with injected times: which runner is fast is the test's decision, not the machine's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from zeroskip.bench.timer import Race
from zeroskip.planning import break_even, measure, siblings, whole

Rule = Callable[[str], float]


def inject(monkeypatch: pytest.MonkeyPatch, site: Rule, model: Mapping[str, float] | None = None) -> list[list[str]]:
    """Replace the races: every runner is called once and its time is what the rule says. Returns the races' runners."""
    held: list[list[str]] = []

    def race(runners: Mapping[str, Sequence[Callable[[], object]]], **options: Any) -> Race:
        held.append(list(runners))
        for name, calls in runners.items():
            (options.get("prepare") or {}).get(name, lambda: None)()
            calls[0]()
        rule = site if model is None or "compiled" not in runners else model.__getitem__
        return Race({name: [rule(name)] * 5 for name in runners}, rounds=5)

    for module in (measure, whole, break_even, siblings):
        monkeypatch.setattr(module, "race", race)
    return held


def prefer(*wanted: str) -> Rule:
    """Runners whose name starts with an earlier prefix are faster; all others take a second."""

    def rule(name: str) -> float:
        return next((0.1 * (i + 1) for i, prefix in enumerate(wanted) if name.startswith(prefix)), 1.0)

    return rule


def strips(weight: torch.Tensor, kept: int = 8, of: int = 16, strip: int = 64) -> torch.Tensor:
    """Return the weight [m, k] with N of every M inputs kept, the choice shared by strips of rows."""
    rows, k = weight.shape
    draw = torch.rand(-(-rows // strip), k // of, of, generator=torch.Generator().manual_seed(3))
    mask = (draw.argsort(-1).argsort(-1) < kept).view(-1, k).repeat_interleave(strip, dim=0)[:rows]
    return weight.detach() * mask


class Net(nn.Module):
    """Two pruned layers of one shape and a dense one."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 128, dtype=dtype)
        self.second = nn.Linear(128, 64, bias=False, dtype=dtype)
        self.third = nn.Linear(64, 128, dtype=dtype)
        with torch.no_grad():
            self.first.weight.copy_(strips(self.first.weight))
            self.third.weight.copy_(strips(self.third.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.third(self.second(torch.relu(self.first(x))))
        return y


SPARSE = prefer("strip_nm")
X = torch.randn(6, 64, generator=torch.Generator().manual_seed(5))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool(((a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max()).item())
