"""`zeroskip bench`: the benchmarks; `kernels` is the one that is here."""

from __future__ import annotations

from typing import Annotated

import typer

from zeroskip.cli.terminal import Json, app, command, progress, say, write_json

__all__ = ["group", "kernels"]

group = typer.Typer(no_args_is_help=True, help="Benchmarks on this machine.")
app.add_typer(group, name="bench")


@group.callback()
def _group() -> None:
    """Benchmarks on this machine."""


@command("kernels", "zeroskip bench kernels --quick", group)
def kernels(
    quick: Annotated[bool, typer.Option("--quick", help="One shape, half a minute, not minutes.")] = False,
    json_path: Json = None,
) -> None:
    """Race our kernels against nn.Linear and every other dense layer; a wrong result gets no time."""
    from zeroskip.bench.kernels import bench_kernels

    with progress("kernels") as advance:
        found = bench_kernels(quick, advance)
    write_json(json_path, found.to_dict())
    say(found)
