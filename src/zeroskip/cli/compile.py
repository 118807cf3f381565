"""`zeroskip compile`: measure every site on this machine, pack what gets faster, store the result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zeroskip.cli.inputs import InputsFile, read_inputs
from zeroskip.cli.terminal import Json, command, progress, say, step, write_json
from zeroskip.errors import ZeroskipError

__all__ = ["compile", "token_counts"]

Tokens = Annotated[
    str, typer.Option(metavar="T[,T...]", help="Token counts to be good at; COUNT:WEIGHT says how often each occurs.")
]
Precision = Annotated[
    str | None,
    typer.Option(
        help="Storage and compute down to fp32, bf16, int8 or int4 may compete. Default: what the weights are."
    ),
]


@command("compile", "zeroskip compile out out-compiled --tokens 1,32,512 --precision bf16")
def compile(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A pruned model: a directory or hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write: new or empty.")],
    tokens: Tokens = "1,32,512",
    precision: Precision = None,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="Give a row the same bits whatever else is in the batch; slower.")
    ] = False,
    prefer: Annotated[
        str, typer.Option(help="speed; or bytes: the smallest that is nowhere slower than the layer as it stands.")
    ] = "speed",
    inputs: InputsFile = None,
    json_path: Json = None,
) -> None:
    """Compile MODEL for this machine and store it, with its plan, in OUT.

    A site is packed only if that is faster than the fastest dense layer at every token count; the plan says which and
    why. With --prefer bytes it takes what is smallest and nowhere slower than the layer as it stands.
    """
    counts = token_counts(tokens)
    from zeroskip.cli import models
    from zeroskip.io.save import check_new
    from zeroskip.planning.candidates import check_precision
    from zeroskip.planning.plan import check_prefer

    check_new(out)
    check_precision(precision)
    check_prefer(prefer)
    with step(f"loading {model}"):
        network = models.load(model)
    examples = read_inputs(inputs, network)

    from zeroskip.compile import compile as compile_model
    from zeroskip.io import save
    from zeroskip.planning.plan import plan_of

    with progress("measuring") as advance:
        network = compile_model(
            network,
            tokens=counts,
            precision=precision,
            example_inputs=examples,
            batch_invariant=batch_invariant,
            prefer=prefer,
            progress=advance,
        )
    with step(f"writing {out}"):
        save(network, out, tokenizer=models.Companions(model))
    plan = plan_of(network)
    write_json(json_path, plan.to_dict())
    say(plan)
    say(f"stored in {out}; next: zeroskip run {out}")


def token_counts(text: str) -> list[int] | dict[int, float]:
    """Read ``'1,32,512'``, or with weights ``'1:10,512:1'``.

    Raises
    ------
    ZeroskipError
        If it is neither.
    """
    parts = [part.partition(":") for part in text.split(",")]
    try:
        counts = [int(count) for count, _, _ in parts]
        weights = [float(weight) if colon else 1.0 for _, colon, weight in parts]
    except ValueError:
        raise ZeroskipError(f"--tokens {text!r}: give counts such as 1,32,512, or with weights 1:10,512:1") from None
    from zeroskip.planning.tokens import Tokens as Counts

    given: list[int] | dict[int, float] = counts
    if any(colon for _, colon, _ in parts):
        twice = [count for count in counts if counts.count(count) > 1]
        if twice:
            raise ZeroskipError(f"--tokens {text!r}: {twice[0]} has two weights: give it one")
        given = dict(zip(counts, weights, strict=True))
    Counts.parse(given)  # before a large model is loaded
    return given
