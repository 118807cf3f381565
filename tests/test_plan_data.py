"""The plan as data: stored and read, printed, damaged, of another machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from zeroskip.errors import ZeroskipError
from zeroskip.planning.machine import this_machine
from zeroskip.planning.plan import Folded, Fused, ModelCheck, Plan, SitePlan, plan_of
from zeroskip.planning.tokens import Tokens


def a_plan() -> Plan:
    sites = [
        SitePlan(
            f"layers.{i}.fc",
            (64, 32),
            "fp32",
            "8:16@64",
            0.5,
            "strip_nm",
            "bf16",
            [(5, "spmm_a"), (None, "spmm_b")],
            "strip_nm bf16: faster",
            8192,
            2112,
            {"strip_nm bf16": {"spmm_a": {1: 0.5, 32: 1.0}}},
            {"strip_nm bf16": {1: 2.0, 32: 1.5}},
            {"strip_nm bf16": 2112},
            {"csr fp32": "not today"},
            "layers.0.fc",
        )
        for i in range(3)
    ]
    check = ModelCheck("eager", "kept", "interleaved", {1: (1.2, 1.1, 1.3), 32: (1.4, 1.3, 1.5)})
    return Plan(this_machine(), Tokens((1, 32), (3.0, 1.0)), "bf16", sites, [check], ["a note"])


def test_plan_round_trip(tmp_path: Path) -> None:
    plan = a_plan()
    plan.save(tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]


def test_every_field_survives() -> None:
    plan = a_plan()
    plan.fused, plan.batch_invariant, plan.rows = [Fused(["a", "b"], {1: 1.25})], True, ["lm_head"]
    plan.folded, plan.prefer = [Folded("a", "act", "gelu")], "bytes"
    site = plan.sites[0]
    site.measured_at, site.pinned, site.passed_over, site.excluded = "fc", True, {"csr bf16": 1.5}, {"csr fp32": "slow"}
    for one in (plan, site, plan.checks[0], plan.fused[0]):
        for each in dataclasses.fields(one):  # what has its default would come back without having been stored
            default = each.default_factory() if callable(each.default_factory) else each.default
            assert getattr(one, each.name) != default, each.name
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_plan_as_text() -> None:
    text = str(a_plan())
    assert "layers.*.fc (3)" in text and "8:16@64 50%" in text and "strip_nm bf16" in text
    assert "2.00" in text and "1.50" in text and "strip_nm bf16: faster" in text
    assert "1.20x (1.10-1.30) at 1 token," in text and "note: a note" in text
    assert all(len(line) <= 140 for line in text.splitlines())
    plan = a_plan()
    plan.sites[1].pattern = "4:8@64"  # unlike the others, and alone
    text = str(plan)
    assert "layers.*.fc (2)" in text and "layers.1.fc " in text


def test_plan_of_a_model_without_one() -> None:
    with pytest.raises(ZeroskipError, match=r"zs\.compile"):
        plan_of(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "damage",
    [
        {"version": 99},
        {"sites": [{**a_plan().sites[0].__dict__, "name": 1e308}]},
        {"sites": [{**a_plan().sites[0].__dict__, "sparsity": "half"}]},
        {"machine": {**this_machine().to_dict(), "isa": ["scalar", 2]}},
        {"sites": [{}]},
        {"machine": {"cpu": 1}},
        {"tokens": None},
        {"tokens": {"counts": ["one"], "weights": None}},
        {"tokens": {"counts": [1, 2], "weights": [1.0]}},
        {"fused": [{"names": ["a", "b"], "ratios": {"many": 1.0}}]},
    ],
)
def test_damaged_plans(damage: dict[str, Any]) -> None:
    with pytest.raises(ZeroskipError, match="plan"):
        Plan.from_dict({**a_plan().to_dict(), **damage})


def test_a_plan_that_cannot_be_written(tmp_path: Path) -> None:
    for place in (tmp_path / "none" / "plan.json", tmp_path):
        with pytest.raises(ZeroskipError, match="cannot be written"):
            a_plan().save(place)
    assert not list(tmp_path.iterdir())


def test_unreadable_plans(tmp_path: Path) -> None:
    with pytest.raises(ZeroskipError, match=r"nowhere\.json"):
        Plan.load(tmp_path / "nowhere.json")
    (tmp_path / "other.json").write_text("[1, 2")
    with pytest.raises(ZeroskipError, match=r"other\.json"):
        Plan.load(tmp_path / "other.json")
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(ZeroskipError, match="not a plan"):
        Plan.load(tmp_path / "list.json")


def test_machines_differ_by_name() -> None:
    here = this_machine()
    assert here.differences(here) == []
    other = dataclasses.replace(here, threads=99, isa=("scalar",))
    assert any("threads 99" in line for line in other.differences(here))
    assert type(here).from_dict(json.loads(json.dumps(here.to_dict()))) == here
