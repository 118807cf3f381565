"""What this machine can do, measured: read bandwidth by size of buffer, and the rate of dense matrix products.

The rates are those that torch reaches, not the CPU's data sheet: they are what a kernel can be held against. Measured
on a shared machine they vary from run to run; compare only with times of the same run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from zeroskip.bench.timer import race

__all__ = ["Roofline", "roofline"]

SIZES_MB = (1, 16, 64, 256)
SIDE = 1024


@dataclass(frozen=True)
class Roofline:
    """Measured limits.

    Attributes
    ----------
    threads : int
    read_gb_per_s : {buffer in MB: GB/s}
        Reading a buffer again and again; large buffers come from memory, small ones from a cache.
    gflop_per_s : {"fp32" | "bf16": GFLOP/s}
        Of a product of two square matrices of side 1024, 2 operations a multiply-add.
    """

    threads: int
    read_gb_per_s: dict[int, float]
    gflop_per_s: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        read = {str(size): rate for size, rate in self.read_gb_per_s.items()}
        return {"threads": self.threads, "read_gb_per_s": read, "gflop_per_s": dict(self.gflop_per_s)}

    def __str__(self) -> str:
        read = ", ".join(f"{rate:.0f} ({size} MB)" for size, rate in self.read_gb_per_s.items())
        rate = ", ".join(f"{kind} {value:.0f}" for kind, value in self.gflop_per_s.items())
        plural = "" if self.threads == 1 else "s"
        return f"on {self.threads} thread{plural}: reads {read} GB/s; dense products {rate} GFLOP/s"


def roofline(sizes_mb: tuple[int, ...] = SIZES_MB, budget_s: float = 0.3) -> Roofline:
    """Measure the limits with torch's present number of threads, `budget_s` seconds each."""
    with torch.inference_mode():
        return Roofline(torch.get_num_threads(), _read(sizes_mb, budget_s), _multiply(budget_s))


def _read(sizes_mb: tuple[int, ...], budget_s: float) -> dict[int, float]:
    rates: dict[int, float] = {}
    for size in sizes_mb:
        # One sum over int32 reads everything once, adds exactly, and uses all threads.
        buffer = torch.ones(size << 18, dtype=torch.int32)
        seen = race({"read": [partial(torch.sum, buffer, dtype=torch.int32)]}, budget_s=budget_s, max_rounds=10_000)
        rates[size] = buffer.nbytes / min(seen.samples["read"]) / 1e9
    return rates


def _multiply(budget_s: float) -> dict[str, float]:
    calls = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(SIDE, SIDE, dtype=dtype), torch.randn(SIDE, SIDE, dtype=dtype)
        calls[name] = [partial(nn.functional.linear, a, b)]
    seen = race(calls, budget_s=2 * budget_s, min_rounds=3)
    return {name: 2.0 * SIDE**3 / min(seen.samples[name]) / 1e9 for name in calls}
