"""`--inputs FILE`: what a model is to be run on, where made-up tokens will not do (images, sound, series)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor, nn

from zeroskip.errors import ZeroskipError, first_line

__all__ = ["InputsFile", "check_text", "read_inputs"]

InputsFile = Annotated[
    Path | None,
    typer.Option(
        "--inputs",
        metavar="FILE",
        help="What to run the model on: .npy, .safetensors (arguments by name) or .pt (a tensor, some, or by name).",
    ),
]
ENDINGS = (".npy", ".safetensors", ".pt", ".pth")


def check_text(option: str, path: Path | None) -> None:
    """Find out before a model is loaded, not after it, that a file holds no text."""
    if path is None:
        return
    if not path.exists() or path.is_dir():
        raise ZeroskipError(f"{option} {path}: no such file")
    if path.is_file():  # a pipe is read once, later
        from zeroskip.calibrate import strings_of

        strings_of(path)


def read_inputs(path: Path | None, model: nn.Module) -> Any:
    """Read a tensor, a tuple of tensors or a dict of tensors; nothing in the file is executed.

    Floating-point ones become what the model's weights are.

    Raises
    ------
    ZeroskipError
        If the file cannot be read, or holds anything else.
    """
    if path is None:
        return None
    if path.suffix not in ENDINGS:
        raise ZeroskipError(f"{path}: inputs come as {', '.join(ENDINGS)}")
    try:
        found = _read(path)
    except Exception as error:  # numpy, safetensors and pickle raise what they like at damaged files
        raise ZeroskipError(f"{path}: cannot be read: {first_line(error)}") from error
    values = found.values() if isinstance(found, dict) else found if isinstance(found, tuple | list) else [found]
    if not values or not all(isinstance(value, Tensor) for value in values):
        raise ZeroskipError(f"{path}: holds a {type(found).__name__}, not a tensor, several, or several by name")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)

    def cast(value: Tensor) -> Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    if isinstance(found, dict):
        return {str(name): cast(value) for name, value in found.items()}
    return tuple(cast(value) for value in values) if isinstance(found, tuple | list) else cast(found)


def _read(path: Path) -> Any:
    if path.suffix == ".npy":
        import numpy as np
        import torch

        return torch.from_numpy(np.load(path, allow_pickle=False))
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    import torch

    return torch.load(path, weights_only=True, map_location="cpu")
