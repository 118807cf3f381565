"""`zeroskip convert`: models in the formats of other tools, in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zeroskip.cli.terminal import Json, command, say, step, write_json

__all__ = ["convert"]


@command("convert", "zeroskip convert llama-2of4-int4 llama-2of4 --to dense")
def convert(
    model: Annotated[Path, typer.Argument(metavar="IN", help="A directory, or a weight file beside its config.json.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write: new or empty.")],
    to: Annotated[str, typer.Option(help="dense, sparse-bitmask, sparse-24-bitmask or zeroskip.")] = "dense",
    mask: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Masks: .npz of MaskLLM, .safetensors, .pt. Repeat.")
    ] = None,
    sparsity_config: Annotated[
        bool, typer.Option("--sparsity-config", help="Add what compressed-tensors up to 0.14.0.1 needs to read it.")
    ] = False,
    old_names: Annotated[
        bool, typer.Option("--old-names", help="Bitmasks with the tensor names of compressed-tensors up to 0.8.1.")
    ] = False,
    json_path: Json = None,
) -> None:
    """Turn IN into ordinary weights with zeros, into a bitmask format of compressed-tensors, or into our packed one.

    Read are sparse-bitmask, sparse-24-bitmask, marlin-24, pack-quantized, int- and float-quantized, what zeroskip
    compiled, and weights with masks of MaskLLM, torch.nn.utils.prune, torch.ao, ASP and Model-Optimizer.
    """
    from zeroskip.convert import convert as convert_model

    with step(f"converting {model}"):
        done = convert_model(model, out, to, masks=mask or (), sparsity_config=sparsity_config, old_names=old_names)
    write_json(json_path, done.to_dict())
    say(done)
    say(f"stored in {out}")
