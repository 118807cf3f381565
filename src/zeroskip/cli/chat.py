"""`zeroskip chat`: converse with a language model in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from zeroskip.cli.terminal import Json, command, step, utf8, write_json
from zeroskip.errors import ZeroskipError

__all__ = ["chat"]


@command("chat", "zeroskip chat model-compiled --temperature 0.7")
def chat(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A causal language model, compiled or not, or a hub id.")],
    system: Annotated[str | None, typer.Option(help="What the model is told before you say anything.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Only the likeliest tokens that together have this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of what is drawn at a temperature above 0.")] = None,
    json_path: Json = None,
) -> None:
    """Converse with a model; it sees the whole conversation each time.

    Ctrl-C stops an answer, and what was said stays in the conversation. Ctrl-C or Ctrl-D at the prompt ends it; /new
    begins another one.
    """
    from zeroskip.cli import models
    from zeroskip.cli.generating import Drawing, generate
    from zeroskip.serve.prompts import chat_tokens

    drawing = Drawing(max_new_tokens, temperature, top_p, seed)
    with step(f"loading {model}"):
        network = models.load(model)
        tokenizer = models.load_tokenizer(model)
    if not models.is_causal_lm(network):
        raise ZeroskipError(
            f"{model} is a {type(network).__name__}, which does not converse: give a causal language model"
        )
    start = [] if system is None else [{"role": "system", "content": system}]
    turns, told = list(start), 0
    while (said := _listen()) is not None:
        if said.strip() == "/new":
            turns = list(start)
            continue
        if not said.strip():
            continue
        asked = [*turns, {"role": "user", "content": said}]
        try:
            utf8(said, "what you typed")
            spoken = generate(network, tokenizer, chat_tokens(tokenizer, asked), drawing, _show)
        except ZeroskipError as error:
            typer.echo(f"{error}; /new begins another conversation", err=True)
            continue
        typer.echo()
        typer.echo(f"({spoken}{', stopped' if spoken.stopped else ''})", err=True)
        turns, told = [*asked, {"role": "assistant", "content": spoken.text}], told + spoken.new_tokens
        write_json(json_path, {"model": model, "turns": turns, "new_tokens": told})


def _listen() -> str | None:
    """Return what is typed, None at the end."""
    if sys.stdin.isatty():
        typer.echo("> ", nl=False, err=True)
    try:
        line = sys.stdin.readline()
    except KeyboardInterrupt:
        typer.echo(err=True)
        return None
    return line.rstrip("\n") if line else None


def _show(piece: str) -> None:
    typer.echo(piece, nl=False)
