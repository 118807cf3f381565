"""What a measured plan is valid for: this CPU, these ISA rows, this many threads, these versions."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from zeroskip.isa import isa

__all__ = ["Machine", "available_memory_bytes", "cache_bytes", "cold_bytes", "this_machine"]

DEFAULT_CACHES = (1 << 20, 32 << 20)  # where the system does not tell: level 2 of a core, level 3


@dataclass(frozen=True)
class Machine:
    """The fingerprint of a machine and of the software that measured on it.

    Attributes
    ----------
    cpu : str
        The CPU's own name of its model.
    cpus : int
        CPUs this process may use.
    isa : tuple of str
        Rows that the kernels can use here, after ZEROSKIP_ISA.
    threads : int
        torch.get_num_threads() when measuring.
    torch, zeroskip : str
        Versions.
    """

    cpu: str
    cpus: int
    isa: tuple[str, ...]
    threads: int
    torch: str
    zeroskip: str

    def differences(self, other: Machine) -> list[str]:
        """Return one phrase a field that differs, such as ``'threads 2, here 4'`` (`other` is "here")."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return [f"{name} {_text(mine)}, here {_text(theirs)}" for name, mine, theirs in pairs if mine != theirs]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "isa": list(self.isa)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Machine:
        return cls(**{**data, "isa": tuple(data["isa"])})

    def __str__(self) -> str:
        rows = " ".join(self.isa)
        return f"{self.cpu}, {self.threads} of {self.cpus} CPUs, {rows}, torch {self.torch}, zeroskip {self.zeroskip}"


def this_machine() -> Machine:
    """Return the fingerprint of this process's machine, at the present number of threads."""
    return Machine(_cpu_name(), _usable_cpus(), _isa_rows(), torch.get_num_threads(), torch.__version__, _version())


def available_memory_bytes() -> int:
    """Return the bytes that can still be used without swapping (8 GiB where the system does not tell)."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 8 << 30


def cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> tuple[int, int]:
    """Return the bytes of one core's level 2 and of the level 3 that it shares; a common size where unknown."""
    found = dict(zip((2, 3), DEFAULT_CACHES, strict=True))
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    for index in folder.glob("index*"):
        try:
            level = int((index / "level").read_text())
            size = re.fullmatch(r"(\d+)([KMG]?)", (index / "size").read_text().strip())
        except (OSError, ValueError):
            continue
        if level in found and size:
            found[level] = int(size[1]) * units[size[2]]
    return found[2], found[3]


@cache
def cold_bytes() -> int:
    """Return how many bytes have to be touched between two uses of a weight for it to come from memory again.

    Twice the last level of cache: copies that just filled it would in part be found there.
    """
    return max(256 << 20, 2 * cache_bytes()[1])


@cache
def _cpu_name() -> str:
    """The vendor's name with family, model and stepping: a hypervisor often hides the name, seldom the numbers."""
    found: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    if "model name" not in found:
        return platform.processor() or platform.machine()
    numbers = "/".join(found.get(key, "?") for key in ("cpu family", "model", "stepping"))
    return f"{found['model name']} ({numbers})"


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _isa_rows() -> tuple[str, ...]:
    info = isa()
    rows = tuple(info.available)
    # A forced lower row makes another machine of this one.
    return rows[: rows.index(info.active) + 1] if info.active in rows else rows


def _version() -> str:
    import zeroskip  # not at the top: the package imports this module

    return zeroskip.__version__


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
