"""`zeroskip info`: what this machine offers, and what stands in the way."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from zeroskip.cli.process import cpu_limit, openmp_runtimes
from zeroskip.cli.terminal import Json, command, progress, say, write_json

__all__ = ["info"]


@command("info", "zeroskip info --json machine.json")
def info(
    roofline: Annotated[bool, typer.Option(help="Measure arithmetic and bandwidth at 1 and all threads.")] = True,
    json_path: Json = None,
) -> None:
    """Show version, CPU, the instruction sets (ISA rows) in use, threads, limits and the measured roofline."""
    facts = collect(roofline)
    write_json(json_path, facts)
    width = max(map(len, facts))
    for name, value in facts.items():
        if name == "roofline":
            _show_rooflines(value, width)
        elif name != "warnings":
            say(f"{name:<{width}}  {_text(value)}")
    for warning in facts["warnings"]:
        say(f"warning: {warning}")


def _show_rooflines(measured: list[dict[str, Any]], width: int) -> None:
    from zeroskip.bench.roofline import Roofline

    for at, one in enumerate(measured):
        say(f"{'' if at else 'roofline':<{width}}  {Roofline.from_dict(one)}")


def collect(roofline: bool) -> dict[str, Any]:
    """Return what the command shows; only the roofline takes time."""
    import torch

    import zeroskip
    from zeroskip.planning.machine import this_machine

    rows = zeroskip.isa()
    limit, runtimes = cpu_limit(), openmp_runtimes()
    facts: dict[str, Any] = {
        "zeroskip": zeroskip.__version__,
        "cpu": this_machine().cpu,
        "isa in use": rows.active,
        "isa available": list(rows.available),
        "isa unavailable": dict(rows.unavailable),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpus usable": len(os.sched_getaffinity(0)),
        "cpu limit": limit,
        "openmp": runtimes,
        "warnings": _warnings(limit, runtimes, torch.get_num_threads()),
    }
    if roofline:
        from zeroskip.bench.roofline import rooflines

        most = len(os.sched_getaffinity(0)) if limit is None else max(1, int(limit))
        with progress("measuring the roofline") as advance:
            facts["roofline"] = [one.to_dict() for one in rooflines(sorted({1, most}), progress=advance)]
    return facts


def _warnings(limit: float | None, runtimes: list[str], threads: int) -> list[str]:
    out = []
    if len(runtimes) > 1:
        out.append(
            f"{len(runtimes)} OpenMP runtimes in one process ({', '.join(Path(path).name for path in runtimes)}): "
            "their threads fight for the cores; import torch before anything that brings its own"
        )
    if limit is not None and threads > max(1, round(limit)):
        out.append(
            f"{threads} threads where the container allows {limit:g} CPUs: set OMP_NUM_THREADS={max(1, int(limit))}"
        )
    return out


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_text(one)}" for name, one in value.items()) or "none"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
