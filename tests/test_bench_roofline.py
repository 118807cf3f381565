"""The loops that measure what the machine can do."""

import json

import pytest
from bench_cases import LIMITS

from zeroskip.bench.roofline import Roofline, roofline
from zeroskip.planning import machine
from zeroskip.planning.machine import cache_bytes


def test_roofline_survives_json_and_bounds_by_precision():
    measured = roofline(0.001, {"L2": 1 << 16, "memory": 1 << 18})
    assert Roofline.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured
    assert measured.peak_gflop_per_s["fp32"] > 0 and measured.memory_gb_per_s > 0
    wide = Roofline(1, "amx", {"fp32": 100.0, "bf16": 900.0}, {}, ())
    assert (wide.peak("fp32"), wide.peak("bf16"), wide.peak("int4")) == (100.0, 900.0, 900.0)
    assert LIMITS.peak("bf16") == 100.0


def test_native_loops_refuse_what_makes_no_sense():
    from zeroskip import _core

    assert _core.multiply_add(False, 10, 1) > 0 and _core.multiply_add(False, 10, 2) == 2 * _core.multiply_add(
        False, 10, 1
    )
    for call in (lambda: _core.multiply_add(False, -1, 1), lambda: _core.read_once(0, 64, 0)):
        with pytest.raises(ValueError, match="out of range"):
            call()
    _core.read_once(0, 0, 1)


def test_cache_sizes_come_from_the_system(tmp_path):
    assert cache_bytes(tmp_path) == (1 << 20, 32 << 20)
    for index, (level, size) in enumerate([("1", "32K"), ("2", "2048K"), ("3", "480M")]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "level").write_text(level + "\n")
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert cache_bytes(tmp_path) == (2 << 20, 480 << 20)


def test_weights_are_cold_beyond_twice_the_last_cache(monkeypatch):
    for level3, cold in ((32 << 20, 256 << 20), (260 << 20, 520 << 20)):
        monkeypatch.setattr(machine, "cache_bytes", lambda level3=level3: (1 << 20, level3))
        assert machine.cold_bytes.__wrapped__() == cold
