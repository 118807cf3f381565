"""`zeroskip run`: embed lines of text with an encoder, or continue a prompt with a language model."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zeroskip.cli.terminal import Json, command, progress, say, step, write_json
from zeroskip.errors import ZeroskipError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["run"]

SHOWN_CHARS = 60


@command("run", "echo 'Sort a list in place.' | zeroskip run demo-model")
def run(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A model directory, compiled or not, or a hub id.")],
    text: Annotated[list[str] | None, typer.Option(help="A line to embed. Repeat. Default: lines of stdin.")] = None,
    prompt: Annotated[str | None, typer.Option(help="For a language model: what to continue.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="For a language model: how far.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="For an encoder: where a line is cut.")] = 128,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Print whole vectors, one JSON object a line.")] = False,
    json_path: Json = None,
) -> None:
    """Run a model: mean-pooled embeddings of length one for an encoder, greedy text for a causal language model.

    For each line an encoder prints the other line nearest to it, with their cosine; --jsonl prints the vectors.
    """
    from zeroskip.cli import models

    with step(f"loading {model}"):
        network = models.load(model)
        tokenizer = models.load_tokenizer(model)
    if models.is_causal_lm(network):
        if prompt is None:
            raise ZeroskipError(f"{model} is a language model: give --prompt TEXT")
        _generate(network, tokenizer, prompt, max_new_tokens, json_path)
        return
    if prompt is not None:
        raise ZeroskipError(f"{model} is an encoder ({type(network).__name__}): give --text LINE, not --prompt")
    lines = text or _stdin_lines()
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


def _generate(network: nn.Module, tokenizer: Any, prompt: str, max_new_tokens: int, json_path: Any) -> None:
    import torch

    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].numel() == 0:
        raise ZeroskipError("the prompt holds no token: give --prompt TEXT")
    inputs.pop("token_type_ids", None)
    generator: Any = network
    started = time.perf_counter()
    with torch.inference_mode(), step("generating"):
        ids = generator.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    seconds = time.perf_counter() - started
    made = ids.shape[1] - inputs["input_ids"].shape[1]
    text = tokenizer.decode(ids[0], skip_special_tokens=True)
    say(text)
    typer.echo(f"{made} tokens, {made / seconds:.1f} a second with the prompt's", err=True)
    write_json(json_path, {"prompt": prompt, "text": text, "new_tokens": made, "seconds": seconds})
