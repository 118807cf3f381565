"""`zeroskip analyze`: does sparsity pay in this model, on this machine, site by site; and which recipe pays best?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zeroskip.cli.compile import Precision, Tokens, token_counts
from zeroskip.cli.inputs import InputsFile, check_text, read_inputs
from zeroskip.cli.terminal import Json, command, progress, say, step, write_json
from zeroskip.errors import ZeroskipError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["analyze"]

ALL = "all"


@command("analyze", "zeroskip analyze my-pruned-model --tokens 1,32,512")
def analyze(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face directory or hub id.")],
    tokens: Tokens = "1,32,512",
    precision: Precision = None,
    inputs: InputsFile = None,
    recipes: Annotated[
        str | None,
        typer.Option(metavar="all|NAME,NAME", help="Compare recipes on a dense MODEL instead, and recommend one."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --recipes: calibrate on it and measure perplexity on what is left."),
    ] = None,
    eval_text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --text: measure perplexity on this.")
    ] = None,
    json_path: Json = None,
) -> None:
    """Say why a pruned MODEL is, or is not, smaller and faster: pattern, bytes, measured speed and advice.

    --recipes all applies each recipe to a copy of a dense MODEL and compares bytes, milliseconds and, given text,
    perplexity.
    """
    counts = token_counts(tokens)
    if recipes is None and (text is not None or eval_text is not None):
        raise ZeroskipError("--text and --eval-text measure recipes: give --recipes all, or some by name")
    if eval_text is not None and text is None:
        raise ZeroskipError("--eval-text needs --text FILE, to calibrate on")
    if recipes is not None and inputs is not None:
        raise ZeroskipError("--inputs is of a model as it is, and recipes are compared on tokens: leave one out")
    if recipes is not None and precision is not None:
        raise ZeroskipError("--precision is of the layers as they are, and recipes have their own: leave one out")
    check_text("--text", text)
    check_text("--eval-text", eval_text)
    from zeroskip.cli import models
    from zeroskip.planning.candidates import check_precision
    from zeroskip.prune import Recipe
    from zeroskip.prune.recipe import DEFAULTS

    check_precision(precision)
    names = None if recipes in (None, ALL) else [name.strip() for name in str(recipes).split(",") if name.strip()]
    for name in names or ():
        Recipe.read(DEFAULTS, name)
    with step(f"loading {model}"):
        network = models.load(model)
        tokenizer = None if text is None else models.load_tokenizer(model)
    if recipes is not None:
        _compare(network, names, counts, text, tokenizer, eval_text, json_path)
        return
    examples = read_inputs(inputs, network)

    from zeroskip.analyze import analyze as analyze_model

    with progress("measuring") as advance:
        answer = analyze_model(network, tokens=counts, precision=precision, example_inputs=examples, progress=advance)
    write_json(json_path, answer.to_dict())
    say(answer)


def _compare(
    network: nn.Module,
    names: list[str] | None,
    counts: list[int] | dict[int, float],
    text: Path | None,
    tokenizer: object,
    eval_text: Path | None,
    json_path: Path | None,
) -> None:
    from zeroskip.cli.models import is_causal_lm
    from zeroskip.compare import compare

    if text is not None and not is_causal_lm(network):
        raise ZeroskipError(f"--text {text}: a {type(network).__name__} is no causal language model: leave it out")
    with progress("recipes") as advance:
        found = compare(network, names, counts, text=text, tokenizer=tokenizer, eval_text=eval_text, progress=advance)
    write_json(json_path, found.to_dict())
    say(found)
