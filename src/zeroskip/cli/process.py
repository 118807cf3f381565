"""What the operating system says of this process: CPU limits of its container, OpenMP runtimes it has loaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["cpu_limit", "honour_cpu_limit", "openmp_runtimes"]

OPENMP = re.compile(r"/lib[gi]?omp[\w.-]*\.so[\d.]*$")


def honour_cpu_limit() -> None:
    """Use no more threads than the container has CPUs, unless OMP_NUM_THREADS says otherwise.

    torch counts the CPUs that may be used and does not know of quotas; threads beyond one wait for each other.
    """
    limit = cpu_limit()
    if limit is None or "OMP_NUM_THREADS" in os.environ:
        return
    import torch

    if torch.get_num_threads() > max(1, int(limit)):
        torch.set_num_threads(max(1, int(limit)))


def cpu_limit(root: Path = Path("/sys/fs/cgroup"), mine: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return how many CPUs the container allows, None if as many as there are.

    Reads version 2 of control groups (`cpu.max`) and version 1 (`cpu.cfs_quota_us`), in this process's group and its
    parents, of which the tightest counts.
    """
    try:
        lines = mine.read_text().splitlines()
    except OSError:
        return None
    found: list[float] = []
    for line in lines:
        _, kinds, name = line.split(":", 2)
        if kinds and "cpu" not in kinds.split(","):
            continue
        base = root / "cpu" if kinds else root
        group = base / name.lstrip("/")
        for folder in (group, *group.parents):
            quota = _quota(folder)
            if quota is not None:
                found.append(quota)
            if folder == base:
                break
    return min(found, default=None)


def _quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{part}_us").read_text().strip() for part in ("quota", "period"))
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def openmp_runtimes(maps: Path = Path("/proc/self/maps")) -> list[str]:
    """Return the OpenMP runtimes that this process has loaded, each file once."""
    try:
        lines = maps.read_text().splitlines()
    except OSError:
        return []
    paths = {parts[5] for line in lines if len(parts := line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if OPENMP.search(path))
