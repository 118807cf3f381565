"""The dense weights of a packed model, read again from the files that it was loaded from."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["reread", "weight_files"]

log = logging.getLogger(__name__)


def weight_files(model: nn.Module) -> dict[str, Path]:
    """Return {tensor name: file} of the directory a transformers model was loaded from, empty if there is none."""
    config: Any = getattr(model, "config", None)
    origin = getattr(config, "_name_or_path", None) or getattr(config, "name_or_path", None)
    if not origin or not Path(origin).is_dir():
        return {}
    folder = Path(origin)
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        single = folder / "model.safetensors"
        if single.is_file():
            from safetensors import safe_open

            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
    except (OSError, ValueError, KeyError) as error:
        log.warning("cannot read the weights of %s again: %s", folder, error)
    return {}


def reread(files: dict[str, Path], name: str, stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight in `dtype` from its file if that is the one which was packed, else from the packed one."""
    if stored.dtype == dtype:
        return stored
    for key in (f"{name}.weight", f"{name.partition('.')[2]}.weight"):
        if key not in files:
            continue
        from safetensors import safe_open

        with safe_open(files[key], framework="pt") as file:
            found = file.get_tensor(key)
        if found.shape == stored.shape and torch.equal(found.to(stored.dtype) + 0.0, stored):
            return cast(Tensor, found).to(dtype)
    return stored.to(dtype)
