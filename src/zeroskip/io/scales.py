"""The scales of weights that a solver rounded to integers, in a side file of their own.

Such a model is stored as ordinary weights, each code times scale, and plain transformers loads it. That the weights are
integers shows only together with the scales: with them, packing finds the solver's codes again. The file holds one
tensor a site, by the site's name, [groups, out, ceil(in / group_size)] in fp16, fp32 or bf16. Scales that do not fit
the weights any more, because those were trained on, do no harm: packing sees that and computes its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from zeroskip.errors import ZeroskipError
from zeroskip.io import container
from zeroskip.io.container import Later
from zeroskip.model import Site, every_site
from zeroskip.quantize import GROUPS

__all__ = ["FILE", "restore_scales", "scales_of", "write_scales"]

FILE = "zeroskip_scales.safetensors"
TYPES = (torch.float16, torch.float32, torch.bfloat16)


def scales_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the scales that the sites of a model keep, by the name of the site."""
    kept = ((site.name, site.scales) for site in every_site(model))
    return {name: scales for name, scales in kept if scales is not None}


def write_scales(directory: Path, scales: Mapping[str, Tensor | Later]) -> None:
    """Write the side file to `directory`, if there are scales to write."""
    if scales:
        container.write(directory / FILE, scales, {"format": "pt"})


def restore_scales(model: nn.Module, directory: Path) -> None:
    """Give the sites of a loaded model the scales that `directory` holds for them.

    Raises
    ------
    ZeroskipError
        If the file is damaged, names a site that the model does not have, or holds scales that no weight of that shape
        can have.
    """
    path = directory / FILE
    if not path.exists():
        return
    entries = container.read_header(path)
    sites = {site.name: site for site in every_site(model)}
    try:
        with safe_open(path, "pt") as file:
            for name in entries:
                _keep(path, name, sites.get(name), file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise ZeroskipError(f"{path}: {error}") from None


def _keep(path: Path, name: str, site: Site | None, scales: Tensor) -> None:
    if site is None:
        raise ZeroskipError(f"{path}: {name}: the model has no such site; remove the file to go on without scales")
    groups, rows, columns = site.shape
    able = [-(-columns // size) for size in GROUPS]
    if scales.dtype not in TYPES or scales.dim() != 3 or scales.shape[:2] != (groups, rows):
        expected = f"[{groups}, {rows}, groups of inputs]"
        raise ZeroskipError(f"{path}: {name}: {scales.dtype} {list(scales.shape)} where {expected} are expected")
    if scales.shape[2] not in able:
        raise ZeroskipError(f"{path}: {name}: {scales.shape[2]} scales for {columns} inputs; one serves 32, 64 or 128")
    if not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise ZeroskipError(f"{path}: {name}: a scale is zero, negative or not finite")
    site.keep_scales(scales)
