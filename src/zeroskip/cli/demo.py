"""`zeroskip demo`: prune, compile and measure a real sentence encoder, dense against sparse."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zeroskip.cli.terminal import Json, command, progress, say, write_json

__all__ = ["demo"]


@command("demo", "zeroskip demo --seed 1 --json demo.json")
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the sparse model goes; an older one is replaced.")] = (
        Path("demo-model")
    ),
    seed: Annotated[int, typer.Option(help="Which modules calibrate and which test.")] = 0,
    speed: Annotated[bool, typer.Option(help="Time all rivals, or only measure quality and sizes.")] = True,
    json_path: Json = Path("demo.json"),
) -> None:
    """Take a pretrained sentence encoder, prune it at 50 %, and compare speed, size and quality with its dense self."""
    from zeroskip.demo.run import run

    with progress("demo") as advance:
        result = run(out, seed=seed, speed=speed, progress=advance)
    write_json(json_path, result.to_dict())
    say(result)
    say(f"written: {json_path}, {out}; next: echo 'Sort a list in place.' | zeroskip run {out}")
