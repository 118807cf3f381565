"""Open a model's files: safetensors, or what torch.save wrote, of which only tensors are believed."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zeroskip.convert.base import Stored
from zeroskip.errors import ZeroskipError, first_line
from zeroskip.io.container import Later
from zeroskip.io.load import read_files, read_json, weight_files
from zeroskip.io.scales import FILE

__all__ = ["CONFIG", "TORCH", "add_masks", "open_model"]

CONFIG = "config.json"
TORCH = (".bin", ".pt", ".pth")  # suffixes of what torch.save writes
INSIDE = ("state_dict", "model_state_dict", "model", "module")  # where a training script may have put the tensors
Named = dict[str, Later]


def open_model(source: Path) -> Stored:
    """Read the headers of a directory's weight files, or of one file whose directory has the config.json.

    Raises
    ------
    ZeroskipError
        If something is missing or damaged, naming the file, the tensor and the problem.
    """
    if not source.exists():
        raise ZeroskipError(f"{source}: no such directory or file; a model of the hub is to be fetched first")
    if source.is_file() and source.suffix not in (".safetensors", *TORCH):
        raise ZeroskipError(f"{source}: is no weight file: give a directory, or a .safetensors, .bin, .pt or .pth file")
    folder = source if source.is_dir() else source.parent
    if not (folder / CONFIG).exists():
        raise ZeroskipError(f"{folder}: has no {CONFIG}, which says what model the tensors are of")
    config = read_json(folder / CONFIG)
    stored = Stored(source, config, {}, {})
    for file in _weight_files(folder) if source.is_dir() else [source]:
        _add(stored, file)
    if (folder / FILE).exists():
        stored.scales = {name: value.make() for name, value in _read(folder / FILE).items()}
    return stored


def add_masks(stored: Stored, path: Path) -> None:
    """Add the masks of a file: .npz, .safetensors, or what torch.save wrote."""
    if not path.is_file():
        raise ZeroskipError(f"{path}: no such file of masks")
    known = set(stored.tensors)
    _add(stored, path)
    stored.masks |= stored.tensors.keys() - known


def _add(stored: Stored, file: Path) -> None:
    for name, value in _read(file).items():
        if name in stored.tensors:
            raise ZeroskipError(f"{file}: {name}: is also in {stored.files[name].name}")
        stored.tensors[name] = value
        stored.files[name] = file


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a directory, else the pytorch_model files."""
    index = folder / "pytorch_model.bin.index.json"
    if any(folder.glob("model*.safetensors*")) or not (index.exists() or (folder / "pytorch_model.bin").exists()):
        return weight_files(folder)
    if not index.exists():
        return [folder / "pytorch_model.bin"]
    places = read_json(index).get("weight_map")
    names = sorted(set(places.values())) if isinstance(places, dict) else []
    if not names or not all(isinstance(n, str) and n == os.path.basename(n) and n.endswith(TORCH) for n in names):
        raise ZeroskipError(f"{index}: has no weight_map of .bin files of this directory")
    return [folder / name for name in names]


def _read(file: Path) -> Named:
    if file.suffix == ".safetensors":
        found = read_files([file])
        try:
            opened = safe_open(file, "pt")
        except (SafetensorError, OSError) as error:
            raise ZeroskipError(f"{file}: {first_line(error)}") from None
        return {
            name: Later(entry.dtype, entry.shape, partial(opened.get_tensor, name))
            for name, (_, entry) in found.items()
        }
    if file.suffix == ".npz":
        return _read_npz(file)
    if file.suffix in TORCH:
        return _read_torch(file)
    raise ZeroskipError(f"{file}: give a .safetensors, .bin, .pt, .pth or (masks) .npz file")


def _read_torch(file: Path) -> Named:
    """Read the tensors of a file of torch.save; nothing but tensors and plain containers is unpickled."""
    try:
        # The sparsifiers of torch.ao keep masks in a defaultdict(dict), which is read as a plain one.
        with torch.serialization.safe_globals([(_plain, "collections.defaultdict"), dict]):
            content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, EOFError, OSError, AttributeError) as error:
        unsafe = isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error)
        why = "holds other objects than tensors, which could run code; store its state_dict alone" if unsafe else None
        raise ZeroskipError(f"{file}: {why or first_line(error)}") from None
    if isinstance(content, Mapping):
        inner = (content[key] for key in INSIDE if isinstance(content.get(key), Mapping))
        content = next(inner, content)
        if isinstance(content.get("state"), Mapping):  # of a sparsifier: {"state": {name: {"mask": tensor}}}
            parts = ((name, part) for name, part in content["state"].items() if isinstance(part, Mapping))
            content = {f"{name}.{key}": value for name, part in parts for key, value in part.items()}
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise ZeroskipError(f"{file}: holds a {type(content).__name__}, not a state_dict of tensors")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ZeroskipError(f"{file}: {name}: is not an ordinary dense tensor")
    return {name: Later(t.dtype, tuple(t.shape), partial(_itself, t)) for name, t in tensors.items()}


def _plain(*default: Any) -> dict[Any, Any]:
    return {}


def _itself(tensor: Tensor) -> Tensor:
    return tensor.detach()


def _read_npz(file: Path) -> Named:
    import numpy

    found: Named = {}
    try:
        with zipfile.ZipFile(file) as members:
            for member in members.namelist():
                with members.open(member) as data:
                    version = numpy.lib.format.read_magic(data)
                    read = {1: numpy.lib.format.read_array_header_1_0, 2: numpy.lib.format.read_array_header_2_0}
                    shape, _, kind = read[version[0]](data)
                name = member.removesuffix(".npy")
                if kind != numpy.uint8 and kind != numpy.bool_:
                    raise ZeroskipError(f"{file}: {name}: is {kind}; masks are uint8 or bool")
                dtype = torch.uint8 if kind == numpy.uint8 else torch.bool
                found[name] = Later(dtype, tuple(shape), partial(_member, file, name))
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, EOFError, NotImplementedError) as error:
        if isinstance(error, ZeroskipError):
            raise
        raise ZeroskipError(f"{file}: is not a readable .npz file: {first_line(error)}") from None
    return found


def _member(file: Path, name: str) -> Tensor:
    import numpy

    try:
        with numpy.load(file, allow_pickle=False) as arrays:
            return torch.from_numpy(arrays[name])
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, EOFError) as error:
        raise ZeroskipError(f"{file}: {name}: {first_line(error)}") from None
