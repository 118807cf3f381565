"""`zeroskip run`: embed lines of text with an encoder, or continue a prompt with a language model."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zeroskip.cli.terminal import Json, command, progress, say, step, utf8, write_json
from zeroskip.errors import ZeroskipError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["run"]

SHOWN_CHARS = 60


@command("run", "echo 'Sort a list in place.' | zeroskip run demo-model")
def run(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A model directory, compiled or not, or a hub id.")],
    text: Annotated[list[str] | None, typer.Option(help="A line to embed. Repeat. Default: lines of stdin.")] = None,
    prompt: Annotated[str | None, typer.Option(help="For a language model: what to continue.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="For a language model: how far.")] = 64,
    temperature: Annotated[float, typer.Option(help="For a language model: 0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Only the likeliest tokens that together have this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of what is drawn at a temperature above 0.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="For an encoder: where a line is cut.")] = 128,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Print whole vectors, one JSON object a line.")] = False,
    json_path: Json = None,
) -> None:
    """Run a model: mean-pooled embeddings of length one for an encoder, text as it comes for a causal language model.

    For each line an encoder prints the other line nearest to it, with their cosine; --jsonl prints the vectors.
    """
    from zeroskip.cli import models
    from zeroskip.cli.generating import Drawing, generate

    if prompt is not None and text:
        raise ZeroskipError("--prompt is for a language model, --text for an encoder: leave one out")
    drawing = Drawing(max_new_tokens, temperature, top_p, seed)
    with step(f"loading {model}"):
        network = models.load(model)
        tokenizer = models.load_tokenizer(model)
    if models.is_causal_lm(network):
        if prompt is None:
            raise ZeroskipError(f"{model} is a language model: give --prompt TEXT")
        utf8(prompt, "--prompt")
        say(prompt, nl=False)
        spoken = generate(
            network, tokenizer, tokenizer(prompt)["input_ids"], drawing, lambda piece: say(piece, nl=False)
        )
        say()
        typer.echo(str(spoken), err=True)
        told = spoken.to_dict() | {"text": prompt + spoken.text}
        write_json(json_path, {"model": model, "prompt": prompt, "new_text": spoken.text} | told)
        if spoken.stopped:
            raise KeyboardInterrupt
        return
    theirs: Any = network
    if getattr(theirs.config, "is_encoder_decoder", False) and theirs.can_generate():
        kind = type(network).__name__
        raise ZeroskipError(f"{model}: a {kind} has an encoder and a decoder; causal language models and encoders run")
    if prompt is not None:
        raise ZeroskipError(f"{model} is an encoder ({type(network).__name__}): give --text LINE, not --prompt")
    lines = [utf8(line, f"line {number}") for number, line in enumerate(text or _stdin_lines(), start=1)]
    positions = getattr(network.config, "max_position_embeddings", None) or max_tokens
    max_tokens = min(max_tokens, positions, tokenizer.model_max_length)  # a line is cut where the model ends, too
    from zeroskip.demo.task import embed

    done = 0
    started = time.perf_counter()
    with progress("embedding") as advance:

        def count(finished: int) -> None:
            nonlocal done
            done += finished
            advance(done, len(lines), "")

        vectors = embed(network, tokenizer, lines, max_tokens=max_tokens, advance=count)
    seconds = time.perf_counter() - started
    _show(lines, vectors, seconds, jsonl)
    if json_path is not None:
        rows = [{"text": line, "embedding": vector} for line, vector in zip(lines, vectors.tolist(), strict=True)]
        write_json(json_path, {"model": model, "seconds": seconds, "lines": rows})


def _stdin_lines() -> list[str]:
    if sys.stdin.isatty():
        typer.echo("lines to embed, then Ctrl-D:", err=True)
    lines = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not lines:
        raise ZeroskipError("no text: give --text LINE, or lines on stdin")
    return lines


def _show(lines: list[str], vectors: Tensor, seconds: float, jsonl: bool) -> None:
    if jsonl:
        for line, vector in zip(lines, vectors.tolist(), strict=True):
            say(json.dumps({"text": line, "embedding": vector}, ensure_ascii=False))
        return
    for row, line in enumerate(lines):
        shown = line if len(line) <= SHOWN_CHARS else line[: SHOWN_CHARS - 3] + "..."
        cosines = vectors @ vectors[row]
        cosines[row] = -2.0  # not itself
        near = int(cosines.argmax())
        found = f"{cosines[near]:.3f} line {near + 1}" if len(lines) > 1 else ""
        first = " ".join(f"{value:+.3f}" for value in vectors[row, :3].tolist())
        say(f"{row + 1:>4}  {shown:<{SHOWN_CHARS}}  {found or f'{first} ...'}")
    say(f"{len(lines)} lines of {vectors.shape[1]} numbers each, {len(lines) / seconds:.1f} lines a second")
