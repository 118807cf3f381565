"""Many threads, forked children, and the ISA row that a process is told to use."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import example, random
from torch import Tensor

import zeroskip as zs
from zeroskip import _core, ops
from zeroskip.formats.base import names
from zeroskip.isa import limit_to_environment

each_format = pytest.mark.parametrize("name", names())


def weight_of(name: str, m: int = 37, k: int = 64) -> Tensor:
    return example(name, m, k, "fp32", 0)


@pytest.mark.kernels
@each_format
def test_one_handle_from_eight_threads(name: str) -> None:
    packed = zs.pack(weight_of(name, m=100, k=96), name)
    inputs = [random(1 + 9 * i, 96, seed=i) for i in range(8)]
    expected = [zs.linear(packed, x) for x in inputs]
    _core.forget_tuning()  # drop the handle: the threads race to make it

    def work(i: int) -> bool:
        return all(torch.equal(zs.linear(packed, inputs[i]), expected[i]) for _ in range(30))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


FORK = """
import os, torch, zeroskip as zs
torch.set_num_threads(2)
packed = zs.pack(torch.arange(64 * 96.0).view(64, 96) % 7, "csr")
x = torch.ones(40, 96)
expected = zs.linear(packed, x)   # the pool of threads is up
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(zs.linear(packed, x), expected) else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_computes() -> None:
    result = python(FORK)
    assert result.returncode == 0, result.stderr


def test_a_forced_row(monkeypatch: pytest.MonkeyPatch) -> None:
    here = zs.isa()
    monkeypatch.setenv("ZEROSKIP_ISA", "scalar")
    try:
        limit_to_environment()
        assert zs.isa().active == "scalar"
        assert ops.kernels(zs.pack(weight_of("csr"), "csr")) == ("spmm_csr_fp32_scalar",)
    finally:
        assert _core.isa_limit(here.active)
    lacking = [(row, f"lacks {what}") for row, what in here.unavailable.items()]
    for wanted, reason in [("avx1024", "there is no such row"), *lacking]:
        monkeypatch.setenv("ZEROSKIP_ISA", wanted)
        with pytest.raises(zs.ZeroskipError, match=f"ZEROSKIP_ISA={wanted}: .*{reason}; this CPU offers scalar"):
            limit_to_environment()
    assert zs.isa() == here


def test_an_unknown_row_stops_the_import() -> None:
    result = python("import zeroskip", ZEROSKIP_ISA="avx1024")
    assert result.returncode != 0
    assert (
        "ZEROSKIP_ISA=avx1024: there is no such row; this CPU offers scalar" in result.stderr.strip().splitlines()[-1]
    )
