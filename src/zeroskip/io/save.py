"""Write a model to a directory: beside it first, renamed at the end, so that a failure leaves nothing behind."""

from __future__ import annotations

import errno
import glob
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from zeroskip.errors import ZeroskipError, expect
from zeroskip.io import container, meta
from zeroskip.io.container import Later
from zeroskip.io.lock import locked
from zeroskip.io.scales import scales_of, write_scales
from zeroskip.io.tensors import identity, tensors_of
from zeroskip.model import unwrapped

__all__ = ["check_new", "save", "staged", "write_json", "write_weights"]

log = logging.getLogger(__name__)
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = 5_000_000_000,
    ready: Sequence[Path] = (),
) -> None:
    """Store a pruned or compiled model in a new directory; the model is not modified.

    A pruned transformers model becomes an ordinary one with zeros in it, which plain transformers loads, and a file
    zeroskip.json with the report; the scales of weights that a solver rounded go to zeroskip_scales.safetensors. A
    compiled one has a 1-D int8 tensor for each packed site, the plan, the recipe and the report in
    `quantization_config`; after ``import zeroskip``, ``from_pretrained`` loads it memory-mapped. Any other module
    becomes model.safetensors and zeroskip.json, which ``load(directory, model=instance)`` reads.

    Parameters
    ----------
    model : nn.Module
    directory : path
        New or empty.
    tokenizer : optional
        Anything with ``save_pretrained``; stored alongside.
    max_shard_bytes : int
        A weight file is closed before it grows past this; one tensor is never split.
    ready : sequence of Path
        Safetensors files on the same disk that hold tensors of this model already. Each whose tensors are all of the
        model, with the same values, is linked instead of written again.

    Raises
    ------
    ZeroskipError
        If the directory exists and is not empty, the model holds what cannot be stored, or the disk is full. Nothing
        is then left of the attempt.
    """
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise ZeroskipError(f"max_shard_bytes is {max_shard_bytes!r}; give a positive number of bytes")
    expect("model", model, nn.Module, "an nn.Module")
    expect("directory", directory, str | os.PathLike, "a path")
    if tokenizer is not None and not callable(getattr(tokenizer, "save_pretrained", None)):
        raise ZeroskipError(f"tokenizer is a {type(tokenizer).__name__}: give an object with save_pretrained")
    model = unwrapped(model)
    target = check_new(directory)
    info = meta.describe(model)
    tensors = tensors_of(model)
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.device.type == "meta":
            raise ZeroskipError(f"{name}: is on the meta device and has no values to store; load the model first")
    with staged(target) as stage:
        if meta.is_pretrained(model):
            from zeroskip.io.pretrained import write_config

            tensors = write_config(model, info, tensors, stage)
        else:
            tensors = _without_aliases(tensors)
        if not meta.is_pretrained(model) or not info["sites"]:
            write_json(stage / meta.SIDECAR, info)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        write_scales(stage, scales_of(model))
        blobs = [f"{name}.weight" for name, site in info["sites"].items() if site["kind"] == "packed"]
        write_weights(stage, tensors, blobs, max_shard_bytes, ready)
    log.info("stored %d tensors, %d of them packed, in %s", len(tensors), len(blobs), target)


def check_new(directory: str | os.PathLike[str]) -> Path:
    """Return where a directory of this name lies, unless there is something already, or none can be made."""
    target = Path(os.path.realpath(directory))
    if target.exists() and os.path.samefile(target, os.curdir):
        raise ZeroskipError(f"{directory}: is the directory you are in, which would be replaced; name a new one")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ZeroskipError(f"{directory}: exists and is not an empty directory; choose another name or remove it")
    above = next(path for path in (target, *target.parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ZeroskipError(f"{directory}: cannot be made: {above} is no directory that can be written to")
    return target


def write_weights(
    directory: Path,
    tensors: Mapping[str, Tensor | Later],
    blobs: list[str],
    max_shard_bytes: int,
    ready: Sequence[Path] = (),
) -> None:
    """Write the tensors to model.safetensors, or to shards of at most `max_shard_bytes` with an index."""
    linked = [(path, names) for path in ready if (names := _held(path, tensors))]
    done = {name for _, names in linked for name in names}
    shards: list[list[str]] = [[]]
    size = 0
    for name in container.order({name: t for name, t in tensors.items() if name not in done}, blobs):
        if shards[-1] and size + tensors[name].nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensors[name].nbytes
    shards = [*(names for _, names in linked), *(names for names in shards if names or not linked)]
    count = len(shards)
    files = [WEIGHTS] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for (path, _), file in zip(linked, files, strict=False):
        try:
            os.link(path, directory / file)
        except OSError:  # a file system without links
            shutil.copyfile(path, directory / file)
    for file, names in list(zip(files, shards, strict=True))[len(linked) :]:
        container.write(directory / file, {name: tensors[name] for name in names}, {"format": "pt"})
    if count > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _held(path: Path, tensors: Mapping[str, Tensor | Later]) -> list[str]:
    """Return the names of the tensors in a file if each is one of these with the very same bits, else none."""
    entries = container.read_header(path)
    alike = (
        name in tensors and tensors[name].dtype == e.dtype and tensors[name].shape == e.shape
        for name, e in entries.items()
    )
    if not all(alike):
        return []
    with safe_open(path, "pt") as file:
        same = all(_same_bits(tensors[name], file.get_tensor(name)) for name in entries)
    return list(entries) if same else []


def _same_bits(one: Tensor | Later, other: Tensor) -> bool:
    if isinstance(one, Later) or one.device.type != "cpu":
        return False
    flat = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*flat)


def _without_aliases(tensors: Mapping[str, Tensor | Later]) -> dict[str, Tensor | Later]:
    """Keep the first name of a tensor that has several; the instance that is filled knows of the others."""
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        first.setdefault(identity(tensor), name)
    return {name: tensors[name] for name in first.values()}


def write_json(path: Path, value: Any) -> None:
    """Write plain values to a file and sync it."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield a new directory beside `target`; rename it at the end, remove it and the parents made for it on failure.

    What a process that was killed left there on its way to the same target is removed. A stage that is being written
    is locked, and the lock ends with its process.
    """
    made = [parent for parent in target.parents if not parent.exists()]
    stage = target.parent / f".{target.name}.{secrets.token_hex(4)}.saving"
    try:
        stage.mkdir(parents=True)
        for left in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 8}.saving"):
            with suppress(OSError), locked(left) as had:
                if had and left != stage:
                    shutil.rmtree(left)
        with locked(stage):
            yield stage
            os.rename(stage, target)
    except BaseException as error:
        shutil.rmtree(stage, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            why = "the disk is full" if full else error.strerror or str(error)
            raise ZeroskipError(f"{target}: cannot be written: {why}; nothing was stored") from error
        raise
