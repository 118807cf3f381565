"""What `zeroskip.compile` made: blobs, turned into the ordinary weights they hold."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from zeroskip.convert.base import Stored
from zeroskip.errors import ZeroskipError
from zeroskip.io import load, meta
from zeroskip.io.container import Later
from zeroskip.io.load import read_json
from zeroskip.io.scales import scales_of
from zeroskip.io.tensors import tensors_of
from zeroskip.planning.install import thaw

__all__ = ["METHOD", "open_compiled"]

METHOD = "zeroskip"


def open_compiled(stored: Stored) -> int:
    """Replace the blobs of a compiled directory by weights; return how many layers there were.

    The whole model is loaded: the architecture must say which way round a weight lies and what is tied.
    """
    if not stored.path.is_dir():
        raise ZeroskipError(f"{stored.path}: is of a compiled model; give its directory")
    model: Any = load(stored.path)
    names = thaw(model)
    from zeroskip.io.pretrained import write_config

    with tempfile.TemporaryDirectory() as stage:
        tensors = write_config(model, meta.describe(model), tensors_of(model), Path(stage))
        stored.config = read_json(Path(stage) / "config.json")
    stored.files = dict.fromkeys(tensors, stored.path)
    stored.tensors = {name: _later(tensor) for name, tensor in tensors.items()}
    stored.scales = scales_of(model)
    stored.sparse = {f"{name}.weight" for name in names}
    return len(names)


def _later(tensor: Tensor | Later) -> Later:
    if isinstance(tensor, Later):
        return tensor
    return Later(tensor.dtype, tuple(tensor.shape), tensor.detach)
