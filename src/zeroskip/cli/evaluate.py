"""`zeroskip eval`: how well a language model predicts a text, and how it does in the tasks of lm-eval."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zeroskip.cli.inputs import check_text
from zeroskip.cli.terminal import Json, command, progress, say, step, write_json
from zeroskip.errors import ZeroskipError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["evaluate"]


@command("eval", "zeroskip eval out --text heldout.txt --context 256")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A model directory, compiled or not, or a hub id.")],
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="UTF-8 text, or .json with a list of strings; .gz is unpacked."),
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a window; default: the model's, up to 2048.")] = None,
    stride: Annotated[int | None, typer.Option(help="A window begins every so many tokens; default: context.")] = None,
    tasks: Annotated[str, typer.Option(metavar="NAME,NAME", help="Tasks of lm-eval, if it is installed.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many documents of each task.")] = None,
    as_stored: Annotated[
        bool, typer.Option("--as-stored", help="Compute in the dtype of the file; else fp32, unless compiled.")
    ] = False,
    json_path: Json = None,
) -> None:
    """Measure a causal language model: perplexity on a text, accuracies of lm-eval's tasks, or both.

    Strings are joined with the end-of-text token after each and cut into windows; the first token of a window is not
    scored, nor the end that fills none.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if text is None and not names:
        raise ZeroskipError("nothing to measure: give --text FILE, --tasks NAME, or both")
    check_text("--text", text)
    from zeroskip.cli import models
    from zeroskip.quality import perplexity, run_tasks
    from zeroskip.quality.tasks import check_installed

    if names:
        check_installed()
    with step(f"loading {model}"):
        network = models.load(model)
        tokenizer = models.load_tokenizer(model)
    if not models.is_causal_lm(network):
        raise ZeroskipError(f"{model}: a {type(network).__name__} is no causal language model, and those are measured")
    if not as_stored and not _is_compiled(network):
        network = network.float()
    result: dict[str, Any] = {"model": model}
    if text is not None:
        with progress("perplexity") as advance:
            found = perplexity(network, text, tokenizer, context=context, stride=stride, progress=advance)
        say(found)
        result["perplexity"] = found.to_dict()
    if names:
        with step("lm-eval"):
            result["tasks"] = run_tasks(network, tokenizer, names, limit=limit)
        for task, metrics in result["tasks"].items():
            for metric, value in metrics.items():
                say(f"{task}  {metric}  {value:.4f}")
    write_json(json_path, result)


def _is_compiled(network: nn.Module) -> bool:
    from zeroskip.planning.install import compiled_layers

    return next(compiled_layers(network), None) is not None
