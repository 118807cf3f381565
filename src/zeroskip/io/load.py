"""Read a model back from a directory; nothing in it is believed before it was checked, nothing is unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from zeroskip.errors import ZeroskipError, expect
from zeroskip.io import container, meta
from zeroskip.io.container import Entry
from zeroskip.io.save import INDEX, WEIGHTS
from zeroskip.io.scales import restore_scales
from zeroskip.io.sites import swap
from zeroskip.io.tensors import dtype_name, identity, tensors_of
from zeroskip.io.verify import verify
from zeroskip.model import unwrapped

__all__ = ["check_sites", "load", "read_files", "read_json", "weight_files"]

CONFIG = "config.json"
Found = dict[str, tuple[Path, Entry]]


def load(directory: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Load what `save` wrote, memory-mapped; or any Hugging Face directory with safetensors files.

    Parameters
    ----------
    directory : path
    model : nn.Module, optional
        The instance to fill, in place; it may be on the meta device. Needed where the directory has no config.json
        that names a transformers architecture. The layers that were packed are replaced.

    Returns
    -------
    nn.Module
        In evaluation mode, with ``zeroskip_plan`` and ``zeroskip_report`` where they were stored, and at each site the
        scales of a solver that rounded it to integers.

    Raises
    ------
    ZeroskipError
        If something is missing, damaged or does not fit, naming the file, the tensor and the problem. An instance
        given as `model` is then not usable.
    """
    expect("directory", directory, str | os.PathLike, "a path")
    expect("model", model, nn.Module | None, "an nn.Module or None")
    folder = Path(directory)
    if not folder.is_dir():
        raise ZeroskipError(f"{directory}: no such directory; for a hub id use transformers' from_pretrained")
    config = read_json(folder / CONFIG) if (folder / CONFIG).exists() else None
    info, where = _about(folder, config)
    if model is not None:
        if info is None:
            raise ZeroskipError(f"{directory}: has no {meta.SIDECAR}; only what zeroskip stored can fill an instance")
        inner = unwrapped(model)
        _fill(inner, folder, info, where)
        meta.restore(inner, info, where)
        restore_scales(inner, folder)
        meta.attach(inner)
        return model.eval()
    if config is None:
        raise ZeroskipError(f"{directory}: has no {CONFIG}; pass the instance to fill: load(directory, model=instance)")
    read_files(weight_files(folder))
    from zeroskip.io.pretrained import from_directory

    model = from_directory(folder, config, strict=info is not None)
    if info is not None and where.name == meta.SIDECAR:  # else the quantizer has done it
        meta.restore(model, info, where)
    restore_scales(model, folder)
    return model.eval()


def _about(folder: Path, config: dict[str, Any] | None) -> tuple[dict[str, Any] | None, Path]:
    """Return what zeroskip stored about the model, checked, and the file it is from; None for a foreign directory."""
    stored = (config or {}).get("quantization_config")
    if isinstance(stored, dict) and stored.get("quant_method") == "zeroskip":
        return meta.check(stored, folder / CONFIG), folder / CONFIG
    sidecar = folder / meta.SIDECAR
    return (meta.check(read_json(sidecar), sidecar), sidecar) if sidecar.exists() else (None, sidecar)


def read_json(path: Path) -> dict[str, Any]:
    """Read an object from a JSON file; whatever is wrong with it is one line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ZeroskipError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ZeroskipError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ZeroskipError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a directory: the one file, or those its index names."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        raise ZeroskipError(f"{folder}: has neither {WEIGHTS} nor {INDEX}; other kinds of weight files are not read")
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ZeroskipError(f"{folder / INDEX}: has no weight_map")
    for name, file in places.items():
        if not isinstance(file, str) or file != os.path.basename(file) or not file.endswith(".safetensors"):
            raise ZeroskipError(f"{folder / INDEX}: {name}: {file!r} is not a safetensors file of this directory")
    files = [folder / file for file in sorted(set(places.values()))]
    found = read_files(files)
    for name, file in places.items():
        if name not in found or found[name][0].name != file:
            raise ZeroskipError(f"{folder / INDEX}: {name}: is not in {file}")
    return files


def read_files(files: list[Path]) -> Found:
    """Return where each tensor of these files lies, after checking every header."""
    found: Found = {}
    for file in files:
        if file.suffix != ".safetensors":
            raise ZeroskipError(f"{file}: only safetensors files are read, others could run code")
        for name, entry in container.read_header(file).items():
            if name in found:
                raise ZeroskipError(f"{file}: {name}: is also in {found[name][0].name}")
            found[name] = (file, entry)
    return found


def check_sites(stored: Mapping[str, dict[str, Any]], found: Found, where: str | Path) -> None:
    """Raise unless every site has its weight, and every packed one a blob of the length stated."""
    for site, about in stored.items():
        name = f"{site}.weight"
        if name not in found:
            raise ZeroskipError(f"{where}: {name}: is in none of the weight files")
        file, entry = found[name]
        if about["kind"] == "packed" and (entry.dtype != torch.int8 or entry.shape != (about["nbytes"],)):
            is_now = f"{dtype_name(entry.dtype)} {list(entry.shape)}"
            raise ZeroskipError(f"{file}: {name}: is {is_now} where int8 [{about['nbytes']}] was stored")


def _fill(model: nn.Module, folder: Path, info: dict[str, Any], where: Path) -> None:
    found = read_files(weight_files(folder))
    stored = info["sites"]
    check_sites(stored, found, where)
    groups = _aliases(model, stored)
    swap(model, stored, where)
    expected = tensors_of(model)
    kind = type(model).__name__
    for name, (file, entry) in found.items():
        if name not in expected:
            raise ZeroskipError(f"{file}: {name}: a {kind} has no such tensor; is it the model that was stored?")
        has = list(expected[name].shape)
        if list(entry.shape) != has:
            raise ZeroskipError(f"{file}: {name}: stored as {list(entry.shape)} where the model has {has}")
    source = {name: next((other for other in groups.get(name, [name]) if other in found), "") for name in expected}
    for name in expected:
        if not source[name]:
            raise ZeroskipError(f"{folder}: {name}: is in none of the weight files, and a {kind} needs it")
    tensors = _open(found)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in parameters.keys() & tensors.keys():
        grad = parameters[name].requires_grad and tensors[name].is_floating_point()
        tensors[name] = nn.Parameter(tensors[name], requires_grad=grad)
    for name in expected:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        slots: Any = module._parameters if name in parameters else module._buffers
        slots[leaf] = tensors[source[name]]
    verify(model, lambda name: found[source[name]][0])


def _aliases(model: nn.Module, stored: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return, for each tensor of the instance that has several names, all of them.

    Those of a site are the names of its module: what another module ties to its dense weight is not tied to a blob.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    sites = {id(modules[site]) for site in stored if site in modules}
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in tensors_of(model).items():
        owner, _, leaf = name.rpartition(".")
        module = id(modules[owner])
        groups.setdefault((module, leaf) if module in sites else identity(tensor), []).append(name)
    return {name: group for group in groups.values() for name in group if len(group) > 1}


def _open(found: Found) -> dict[str, Tensor]:
    """Map every tensor; the files stay mapped, privately, as long as a tensor lives."""
    tensors: dict[str, Tensor] = {}
    for file in dict.fromkeys(file for file, _ in found.values()):
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise ZeroskipError(f"{file}: {error}") from None
    return tensors
