"""What this machine can do at best, measured: multiply-adds in registers, and reading at each level of memory.

Both are native loops that do nothing else (csrc/roofline), so they bound every kernel; beside them stands the rate
that torch reaches in a dense product of two matrices. The best of many short samples is taken. On a shared machine
they vary from run to run: compare only with times of the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from zeroskip import _core
from zeroskip.bench.timer import race
from zeroskip.planning.machine import available_memory_bytes, cache_bytes

__all__ = ["Level", "Roofline", "roofline", "rooflines"]

SIDE = 1024  # of the dense product
ROUNDS = 20_000  # multiply-adds in each chain of one sample: some 25 us of arithmetic, repeated
LONG_S = 1e-3  # samples of arithmetic last about this long, so that starting threads costs nothing
MOST_MEMORY = 1 << 30


@dataclass(frozen=True)
class Level:
    """Reading a buffer of `nbytes` again and again from where it fits: ``'L2'``, ``'beyond L2'`` or ``'memory'``."""

    name: str
    nbytes: int
    gb_per_s: float


@dataclass(frozen=True)
class Roofline:
    """Measured limits.

    Attributes
    ----------
    threads : int
    isa : str
        The ISA row whose loops were measured.
    peak_gflop_per_s : {"fp32" | "bf16": GFLOP/s}
        Multiply-adds in registers, 2 operations each; "bf16" only where the row has arithmetic of its own for it.
    product_gflop_per_s : {"fp32" | "bf16": GFLOP/s}
        torch's product of two square matrices of side 1024.
    read : tuple of Level
        From the nearest level to the farthest.
    """

    threads: int
    isa: str
    peak_gflop_per_s: dict[str, float]
    product_gflop_per_s: dict[str, float]
    read: tuple[Level, ...]

    def peak(self, values: str) -> float:
        """Return the peak that a kernel of these values is held against, in GFLOP/s.

        Everything below fp32 may use the bf16 units where there are some; elsewhere all arithmetic is held against
        fp32.
        """
        return self.peak_gflop_per_s["fp32" if values == "fp32" else max(self.peak_gflop_per_s, key=self._rate)]

    def _rate(self, name: str) -> float:
        return self.peak_gflop_per_s[name]

    @property
    def memory_gb_per_s(self) -> float:
        """Read bandwidth of the farthest level: what cold weights come through."""
        return self.read[-1].gb_per_s

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "read": [asdict(level) for level in self.read]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Roofline:
        return cls(**{**data, "read": tuple(Level(**level) for level in data["read"])})

    def __str__(self) -> str:
        peak = ", ".join(f"{kind} {value:.0f}" for kind, value in self.peak_gflop_per_s.items())
        product = ", ".join(f"{kind} {value:.0f}" for kind, value in self.product_gflop_per_s.items())
        read = ", ".join(f"{level.name} {level.gb_per_s:.1f} ({level.nbytes / 1e6:.3g} MB)" for level in self.read)
        plural = "" if self.threads == 1 else "s"
        return (
            f"{self.threads} thread{plural}: peak {peak} GFLOP/s ({self.isa}); torch's dense product {product} "
            f"GFLOP/s; reads {read} GB/s"
        )


def rooflines(
    threads: Sequence[int],
    budget_s: float = 0.3,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> list[Roofline]:
    """Measure at each thread count; torch's own is put back afterwards."""
    before, found = torch.get_num_threads(), []
    try:
        for done, count in enumerate(threads):
            progress(done, len(threads), f"{count} threads")
            torch.set_num_threads(count)
            found.append(roofline(budget_s))
    finally:
        torch.set_num_threads(before)
    progress(len(threads), len(threads), "")
    return found


def roofline(budget_s: float = 0.3, sizes: dict[str, int] | None = None) -> Roofline:
    """Measure the limits with torch's present number of threads.

    Parameters
    ----------
    budget_s : float
        Seconds for each number.
    sizes : {level: bytes}, optional
        Buffers to read, nearest level first; by default as the caches of this CPU have it.
    """
    threads = torch.get_num_threads()
    with torch.inference_mode():
        levels = (sizes or _sizes(threads)).items()
        read = tuple(Level(name, nbytes, _read(nbytes, threads, budget_s)) for name, nbytes in levels)
        return Roofline(threads, _core.isa_active(), _peak(threads, budget_s), _product(budget_s), read)


def _sizes(threads: int) -> dict[str, int]:
    """Half of what the threads' own level 2 holds; well beyond it but within level 3; and beyond that."""
    near, far = cache_bytes()
    memory = min(max(256 << 20, 4 * far), MOST_MEMORY, available_memory_bytes() // 4)
    return {"L2": threads * near // 2, "beyond L2": max(2 * threads * near, min(8 * near, far // 2)), "memory": memory}


def _read(nbytes: int, threads: int, budget_s: float) -> float:
    buffer = torch.ones(nbytes // 4)
    call = partial(_core.read_once, buffer.data_ptr(), buffer.nbytes, threads)
    repeat = max(1, round(LONG_S * 50e9 / nbytes))

    def read() -> None:
        for _ in range(repeat):
            call()

    seen = race({"read": [read]}, budget_s=budget_s, max_rounds=10_000)
    return repeat * buffer.nbytes / min(seen.samples["read"]) / 1e9


def _peak(threads: int, budget_s: float) -> dict[str, float]:
    peaks: dict[str, float] = {}
    for name in ("fp32", "bf16"):
        operations = _core.multiply_add(name == "bf16", ROUNDS, threads)
        if operations == 0:
            continue
        call = partial(_core.multiply_add, name == "bf16", ROUNDS * 20, threads)
        seen = race({name: [call]}, budget_s=budget_s, max_rounds=10_000)
        peaks[name] = 20 * operations / min(seen.samples[name]) / 1e9
    return peaks


def _product(budget_s: float) -> dict[str, float]:
    calls = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(SIDE, SIDE, dtype=dtype), torch.randn(SIDE, SIDE, dtype=dtype)
        calls[name] = [partial(nn.functional.linear, a, b)]
    seen = race(calls, budget_s=2 * budget_s, min_rounds=3)
    return {name: 2.0 * SIDE**3 / min(seen.samples[name]) / 1e9 for name in calls}
