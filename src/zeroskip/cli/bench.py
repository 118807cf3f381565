"""`zeroskip bench`: measure kernels and language models, make the environments of peers, turn results into a report."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from zeroskip.cli.inputs import check_text
from zeroskip.cli.terminal import Json, app, command, progress, say, step, write_json
from zeroskip.errors import ZeroskipError

__all__ = ["group", "kernels", "llm", "peers", "report"]

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
        float, typer.Option(metavar="MINUTES", help="Begin no race after these; what is left out is named.")
    ] = 15.0,
    race: Annotated[float, typer.Option(metavar="SECONDS", help="Time each race for about this long.")] = 2.0,
    cold_mb: Annotated[int, typer.Option(help="Rotate over copies of a weight up to this size.")] = 256,
    quick: Annotated[bool, typer.Option("--quick", help="Two cases and two token counts, shortly.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what an earlier run wrote to --json; also after Ctrl-C.")
    ] = False,
    json_path: Json = None,
) -> None:
    """Race our kernels against nn.Linear, every other dense layer and other libraries; a wrong result gets no time."""
    import torch

    from zeroskip.bench.kernels import Settings, bench_kernels
    from zeroskip.bench.peers.environments import choose
    from zeroskip.bench.results import KernelTable

    settings = Settings(
        suite=suite or ("encoder" if quick else "llm"),
        threads=_counts("--threads", threads) or (torch.get_num_threads(),),
        tokens=_counts("--tokens", tokens),
        peers=tuple(choose(peers)),
        formats=tuple(name for name in formats.split(",") if name),
        cold_bytes=cold_mb << 20,
        race_s=min(race, 0.5) if quick else race,
        minutes=budget,
        quick=quick,
    )
    if resume and json_path is None:
        raise ZeroskipError("--resume needs --json PATH: what it goes on with")
    known = KernelTable.read(json_path) if resume and json_path is not None and json_path.exists() else None
    with progress("kernels") as advance:
        found = bench_kernels(settings, advance, known, lambda table: write_json(json_path, table.to_dict()))
    write_json(json_path, found.to_dict())
    say(found)


@command("llm", "zeroskip bench llm --shape llama-1b --layers 2 --tokens 128 --batch 1,16 --json out.json", group)
def llm(
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="A dense Hugging Face causal model.")] = None,
    shape: Annotated[str, typer.Option(help="Instead of it, random weights of a known shape: llama-1b.")] = "",
    layers: Annotated[int | None, typer.Option(help="With --shape: so many blocks.")] = None,
    recipes: Annotated[str, typer.Option(metavar="NAME,NAME", help="What is done to the model; each is raced.")] = (
        "none,llm-int8-50,llm-int4-50"
    ),
    tokens: Annotated[str, typer.Option(metavar="N,N", help="Tokens of the prompts.")] = "128,1024",
    batch: Annotated[str, typer.Option(metavar="N,N", help="Sequences that are decoded together.")] = "1,4,16",
    threads: Annotated[str, typer.Option(metavar="N,N", help="Thread counts of the races; default: torch's.")] = "",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16: of activations and of what no recipe rounds.")] = "fp32",
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Measure perplexity on it.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a window of --text.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text to prune with. Default: zeros by magnitude, rounding to nearest."),
    ] = None,
    peers: Annotated[str, typer.Option(help="auto (all with low-bit weights), none, or names with commas.")] = "auto",
    modes: Annotated[str, typer.Option(metavar="NAME,NAME", help="Only these modes of the peers, such as q4_0.")] = "",
    dense: Annotated[str, typer.Option(metavar="NAME,NAME", help="Dense models in torch that race.")] = "fp32,bf16",
    profile: Annotated[bool, typer.Option("--profile", help="Take a decode step of each model apart.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="With --profile: also under torch.compile with a static cache.")
    ] = False,
    products: Annotated[
        bool, typer.Option("--products", help="Race the linear layers alone, too: in 4 bits, with peers that can.")
    ] = False,
    prefer: Annotated[str, typer.Option(help="speed or bytes, as for zeroskip compile.")] = "speed",
    embeddings: Annotated[
        str | None, typer.Option(help="What recipes round embeddings and head to: int8, int4 or none.")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="Inputs that share a scale: 32, 64 or 128.")] = None,
    race: Annotated[float, typer.Option(metavar="SECONDS", help="Time each race for about this long.")] = 5.0,
    work: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the models here; what an earlier run has made here is used again."),
    ] = None,
    make_only: Annotated[
        bool, typer.Option("--make-only", help="Measure nothing: only make what can be made beforehand, in --work.")
    ] = False,
    json_path: Json = None,
) -> None:
    """Race language models: each recipe pruned, compiled, stored and loaded again, and the dense model in torch.

    First token, decoding, perplexity; and load time, memory and bytes on disk, each model in a process alone.
    """
    import torch

    from zeroskip.bench.llm import Settings, bench_llm, rivals
    from zeroskip.bench.peers.environments import choose

    settings = Settings(
        model=model,
        shape=shape,
        layers=layers,
        recipes=tuple(name.strip() for name in recipes.split(",") if name.strip()),
        tokens=_counts("--tokens", tokens),
        batch=_counts("--batch", batch),
        threads=_counts("--threads", threads) or (torch.get_num_threads(),),
        dtype=dtype,
        text=text,
        context=context,
        calibration=calibration,
        race_s=race,
        peers=tuple(rivals() if peers == "auto" else choose(peers)),
        modes=_names(modes),
        dense=_names(dense),
        profile=profile or compiled,
        compiled=compiled,
        products=products,
        prefer=prefer,
        embeddings=embeddings,
        group_size=group_size,
        make_only=make_only,
    )
    check_text("--text", text)
    check_text("--calibration", calibration)
    if make_only and work is None:
        raise ZeroskipError("--make-only needs --work DIR: what it makes is for another run")
    with tempfile.TemporaryDirectory(prefix="zeroskip-llm-") as temporary, progress("language models") as advance:
        found = bench_llm(settings, work or Path(temporary), advance)
    write_json(json_path, found.to_dict())
    say(_made(found.missing, work) if make_only else found)


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


def _made(missing: Mapping[str, str], work: Path | None) -> str:
    left = [f"missing: {name}: {why}" for name, why in missing.items()]
    return "\n".join([*left, f"made in {work}; next: the same command without --make-only"])


def _names(given: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))


def _counts(option: str, given: str) -> tuple[int, ...]:
    try:
        counts = tuple(dict.fromkeys(int(part) for part in given.split(",") if part.strip()))
    except ValueError:
        raise ZeroskipError(f"{option} {given!r}: give whole numbers with commas, such as 1,2") from None
    if any(count < 1 for count in counts):
        raise ZeroskipError(f"{option} {given!r}: each is at least 1")
    return counts
