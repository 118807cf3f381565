"""`zeroskip prune`: set weights of a model to zero, with a journal that a killed run goes on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zeroskip.cli.inputs import check_text
from zeroskip.cli.terminal import Json, command, interrupted, progress, say, step, write_json
from zeroskip.errors import ZeroskipError

if TYPE_CHECKING:
    from torch import nn

    from zeroskip.prune import Report

__all__ = ["journal_of", "prune", "report_files"]

ROWS_A_BATCH = 8
EXAMPLE = "zeroskip prune Qwen/Qwen3-0.6B out --recipe llm-int4-50 --text sentences.txt"


@command("prune", EXAMPLE)
def prune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face directory or hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write: new or empty.")],
    method: Annotated[
        str | None,
        typer.Option(help="A name of zeroskip.methods(), such as wanda+ls. Default: obs in strips, else admm+ls."),
    ] = None,
    pattern: Annotated[
        str, typer.Option(help="unstructured, N:M, N:M@V, N:Mt, block:RxC or N:M+dense:25%: docs/pruning.md.")
    ] = "unstructured",
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of zeros in [0, 1); N:M patterns imply theirs.")
    ] = None,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Text to calibrate on, UTF-8.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Instead of text: safetensors, each tensor [rows, ...] an argument by name."),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Only sites of this name: glob or re:REGEX. Repeat.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="No site of this name; '' for none. Repeat. Default: lm_head.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything drawn.")] = 0,
    values: Annotated[str | None, typer.Option(help="int4 or int8, for gptq and sparsegpt+gptq.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Inputs that share a scale: 32, 64 or 128.")] = None,
    embeddings: Annotated[
        str | None, typer.Option(help="What embeddings and head are rounded to: int8, int4 or none.")
    ] = None,
    permute: Annotated[
        bool, typer.Option("--permute", help="Order channels first so that a pattern keeps more.")
    ] = False,
    rotate: Annotated[bool, typer.Option("--rotate", help="Turn attention values first: helps N:M@V.")] = False,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME", help="What to do to which layers: YAML, a pruned model, or a name such as llm-int4-50."
        ),
    ] = None,
    eval_text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Measure perplexity on it. Default: on windows of --text that are left over."
        ),
    ] = None,
    eval_context: Annotated[int | None, typer.Option(help="Tokens of a window of --eval-text. Default: 512.")] = None,
    quality: Annotated[bool, typer.Option(help="Measure a language model's perplexity before and after.")] = True,
    speed: Annotated[
        bool, typer.Option(help="Measure whether the zeros pay on this machine (zeroskip analyze).")
    ] = True,
    budget: Annotated[
        str | None, typer.Option(help="How layers share the zeros: a name of zeroskip.budgets(), such as owl.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="UNIT=AMOUNT,...", help="Of the budget: params=40%, bytes=4e6, ms=12,tokens=32,threads=1."
        ),
    ] = None,
    json_path: Json = None,
) -> None:
    """Prune MODEL and store it in OUT as an ordinary model with zeros in it, with report.json and report.html.

    The weights of MODEL are mapped, and one block at a time is in memory (with +distill all of them). Finished blocks
    are kept in OUT.partial until OUT is there: interrupted or killed, the same command goes on where it stopped and
    gives the same result.
    """
    from zeroskip.cli import models
    from zeroskip.io.save import check_new
    from zeroskip.prune.recipe import Recipe

    check_new(out)
    check_text("--text", text)
    check_text("--eval-text", eval_text)
    if text is not None and calibration is not None:
        raise ZeroskipError("give --text or --calibration, not both")
    # What can be refused without the model is refused before a large one is loaded.
    asked: dict[str, Any] = {"method": method, "pattern": pattern, "sparsity": sparsity, "seed": seed}
    asked |= {"include": include or None, "exclude": exclude if exclude else ("lm_head",)}
    asked |= {"values": values, "group_size": group_size, "rotate": rotate, "permute": permute}
    asked |= {"embeddings": embeddings}
    asked |= {"budget": budget, "target": _read_target(target)}
    read = Recipe.read(asked, recipe)
    if read.needs_data and text is None and calibration is None:
        names = ", ".join(repr(each.name) for each in read.methods if each.needs_data)
        raise ZeroskipError(f"method {names} needs data: give --text FILE or --calibration FILE")
    batches = None if calibration is None else _read_batches(calibration)
    with step(f"loading {model}"):
        network = models.load(model)
        tokenizer = None if text is None and eval_text is None else models.load_tokenizer(model)

    from zeroskip.cli.evidence import Evidence
    from zeroskip.io import save
    from zeroskip.prune import prune as prune_model
    from zeroskip.prune.plan import Plan

    evidence = Evidence(network, tokenizer, text, eval_text, eval_context, read.values["seed"], quality, speed)
    if evidence.judge is not None:
        Plan.of(read, network)  # refuses what cannot be done before time is spent on measuring
    journal = journal_of(out)
    fresh = not journal.exists()
    try:
        evidence.before(network)
        with progress("pruning") as advance:
            report = prune_model(
                network,
                **asked,
                recipe=recipe,
                text=text,
                tokenizer=tokenizer,
                calibration=batches,
                journal=journal,
                stream=not any(each.whole for each in read.methods),
                progress=advance,
            )
        evidence.after(network, report)
        with step(f"writing {out}"):
            blocks = sorted(journal.glob("[0-9]*.safetensors"))
            save(network, out, tokenizer=models.Companions(model, report_files(report, network)), ready=blocks)
    except BaseException as error:
        if interrupted(error):
            kept = any(journal.glob("*.safetensors"))
            raise KeyboardInterrupt(f"(the same command goes on from {journal})" if kept else "") from None
        if fresh and not any(journal.glob("*.safetensors")):  # nothing in it is worth a second try
            shutil.rmtree(journal, ignore_errors=True)
        raise
    shutil.rmtree(journal, ignore_errors=True)
    write_json(json_path, report.to_dict())
    say(report)
    say(f"stored in {out}; next: zeroskip compile {out} {out}-compiled")


def journal_of(out: Path) -> Path:
    """The directory that holds the finished blocks of an unfinished `out`."""
    return out.parent / f"{out.name}.partial"


def report_files(report: Report, network: nn.Module) -> dict[str, str]:
    """Return report.json and report.html."""
    from zeroskip.report import render

    as_json = json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n"
    return {"report.json": as_json, "report.html": render(report, network)}


def _read_target(text: str | None) -> dict[str, Any] | None:
    """Read "ms=12,tokens=32"."""
    if text is None:
        return None
    target: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = (each.strip() for each in part.partition("="))
        if not equals or not value or key in target:
            raise ZeroskipError(f"--target {text}: give UNIT=AMOUNT, such as ms=12,tokens=32, each key once")
        target[key] = _number(value)
    return target


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _read_batches(path: Path) -> list[dict[str, Any]]:
    """Cut the tensors of a file into batches of a few rows."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ZeroskipError(f"--calibration {path}: cannot be read as safetensors: {error}") from None
    lengths = {len(tensor) if tensor.dim() else 0 for tensor in tensors.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise ZeroskipError(f"--calibration {path}: holds no tensors of one equal number of rows")
    starts = range(0, lengths.pop(), ROWS_A_BATCH)
    return [{name: tensor[at : at + ROWS_A_BATCH] for name, tensor in tensors.items()} for at in starts]
