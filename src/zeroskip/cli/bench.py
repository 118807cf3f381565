"""`zeroskip bench`: measure the kernels, make the environments of the peers, turn results into a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zeroskip.cli.terminal import Json, app, command, progress, say, step, write_json
from zeroskip.errors import ZeroskipError

__all__ = ["group", "kernels", "peers", "report"]

group = typer.Typer(no_args_is_help=True, help="Benchmarks on this machine.")
app.add_typer(group, name="bench")


@group.callback()
def _group() -> None:
    """Benchmarks on this machine."""


@command("kernels", "zeroskip bench kernels --suite llm --threads 1,2 --peers auto --budget 15 --json out.json", group)
def kernels(
    suite: Annotated[str, typer.Option(help="llm, encoder or synthetic; default: llm, with --quick encoder.")] = "",
    threads: Annotated[str, typer.Option(metavar="N,N", help="Thread counts; default: torch's.")] = "",
    tokens: Annotated[str, typer.Option(metavar="N,N", help="Token counts; default: the suite's.")] = "",
    peers: Annotated[str, typer.Option(help="auto (all that are installed), none, or names with commas.")] = "none",
    formats: Annotated[str, typer.Option(metavar="NAME,NAME", help="Only these of our formats, and dense.")] = "",
    budget: Annotated[
        float | None, typer.Option(metavar="MINUTES", help="Begin no case after these; what is left out is named.")
    ] = None,
    race: Annotated[float, typer.Option(metavar="SECONDS", help="Time each race for about this long.")] = 2.0,
    cold_mb: Annotated[int, typer.Option(help="Rotate over copies of a weight up to this size.")] = 256,
    quick: Annotated[bool, typer.Option("--quick", help="Two cases and two token counts, shortly.")] = False,
    json_path: Json = None,
) -> None:
    """Race our kernels against nn.Linear, every other dense layer and other libraries; a wrong result gets no time."""
    import torch

    from zeroskip.bench.kernels import Settings, bench_kernels
    from zeroskip.bench.peers.environments import choose

    settings = Settings(
        suite=suite or ("encoder" if quick else "llm"),
        threads=_counts("--threads", threads) or (torch.get_num_threads(),),
        tokens=_counts("--tokens", tokens),
        peers=tuple(choose(peers)),
        formats=tuple(name for name in formats.split(",") if name),
        cold_bytes=max(cold_mb, 0) << 20,
        race_s=min(race, 0.5) if quick else race,
        minutes=budget,
        quick=quick,
    )
    with progress("kernels") as advance:
        found = bench_kernels(settings, advance)
    write_json(json_path, found.to_dict())
    say(found)


@command("peers", "zeroskip bench peers --install onnxruntime", group)
def peers(
    install: Annotated[str, typer.Option(metavar="NAME,NAME", help="Make these environments; 'auto' for all.")] = "",
    json_path: Json = None,
) -> None:
    """Show the libraries that we compare with and where their environments are, or make the environments."""
    from zeroskip.bench.peers import environments, get

    for name in environments.choose(install) if install else ():
        if get(name).requires:
            with step(f"installing {name} into {environments.folder() / name}"):
                environments.install(name)
    told = {name: environments.missing(name) or "installed" for name in environments.choose("auto")}
    write_json(json_path, {"folder": str(environments.folder()), "peers": told})
    say(f"environments in {environments.folder()} (ZEROSKIP_PEERS)")
    for name, state in told.items():
        say(f"{name:<12}  {state}; modes {', '.join(mode.name for mode in get(name).modes)}")


@command("report", "zeroskip bench report out.json --markdown", group)
def report(
    path: Annotated[Path, typer.Argument(metavar="JSON", help="What `zeroskip bench kernels --json` wrote.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="A summary in Markdown.")] = False,
    details: Annotated[bool, typer.Option("--details", help="With --markdown: every case as well.")] = False,
    into: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Put the Markdown between the suite's marks in this file.")
    ] = None,
    json_path: Json = None,
) -> None:
    """Show the result of an earlier benchmark."""
    from zeroskip.bench.report import insert
    from zeroskip.bench.report import markdown as as_markdown
    from zeroskip.bench.results import KernelTable

    found = KernelTable.read(path)
    write_json(json_path, found.to_dict())
    if into is not None:
        into.write_text(insert(into.read_text(encoding="utf-8"), found, details), encoding="utf-8")
    say(as_markdown(found, details) if markdown else found)


def _counts(option: str, given: str) -> tuple[int, ...]:
    try:
        counts = tuple(dict.fromkeys(int(part) for part in given.split(",") if part.strip()))
    except ValueError:
        raise ZeroskipError(f"{option} {given!r}: give whole numbers with commas, such as 1,2") from None
    if any(count < 1 for count in counts):
        raise ZeroskipError(f"{option} {given!r}: each is at least 1")
    return counts
