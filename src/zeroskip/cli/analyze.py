"""`zeroskip analyze`: does sparsity pay in this model, on this machine, site by site?"""

from __future__ import annotations

from typing import Annotated

import typer

from zeroskip.cli.compile import Precision, Tokens, token_counts
from zeroskip.cli.terminal import Json, command, progress, say, step, write_json

__all__ = ["analyze"]


@command("analyze", "zeroskip analyze my-pruned-model --tokens 1,32,512")
def analyze(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face directory or hub id.")],
    tokens: Tokens = "1,32,512",
    precision: Precision = None,
    json_path: Json = None,
) -> None:
    """Say why a pruned MODEL is, or is not, smaller and faster: pattern, bytes, measured speed and advice."""
    counts = token_counts(tokens)
    from zeroskip.cli import models
    from zeroskip.planning.candidates import check_precision

    check_precision(precision)
    with step(f"loading {model}"):
        network = models.load(model)

    from zeroskip.analyze import analyze as analyze_model

    with progress("measuring") as advance:
        answer = analyze_model(network, tokens=counts, precision=precision, progress=advance)
    write_json(json_path, answer.to_dict())
    say(answer)
