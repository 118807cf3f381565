"""`convert`: undo the layers of foreign formats, put on another, write the directory."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zeroskip.convert.base import Format, Stored, writable
from zeroskip.convert.compiled import METHOD, open_compiled
from zeroskip.convert.files import CONFIG, add_masks, open_model
from zeroskip.errors import ZeroskipError, suggest
from zeroskip.io import load, meta, save
from zeroskip.io.companions import copy_companions
from zeroskip.io.load import read_json
from zeroskip.io.save import check_new, staged, write_json, write_weights
from zeroskip.io.scales import write_scales

__all__ = ["Conversion", "convert"]

log = logging.getLogger(__name__)

SHARD = 5_000_000_000
OURS = ("compressed-tensors", "sparseml", None)  # methods whose tensors speak for themselves
# Nothing of these may be left: transformers would pass them over and make up the weights they stand for.
ENDINGS = (
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape", "weight_global_scale"),
    *("compressed", "bitmask", "row_offsets", "scale_packed", "weight_scale_inv", "qweight", "qzeros"),
)
# How activations were to be rounded; a model of plain weights has no use for them.
ACTIVATIONS = (
    *("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point"),
    *("k_scale", "v_scale"),
)


@dataclass
class Conversion:
    """What `convert` did.

    Attributes
    ----------
    found : dict of str to int
        How many weights each format held.
    to : str
    written : int
        How many weights `to` now holds.
    scales : int
        At how many sites scales were kept, so that packing finds the codes again.
    bytes_before, bytes_after : int
        Of the weight files.
    notes : list of str
    """

    found: dict[str, int]
    to: str
    written: int
    scales: int
    bytes_before: int
    bytes_after: int
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        found = ", ".join(f"{count} {name}" for name, count in self.found.items()) or "ordinary weights"
        sizes = f"{self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB"
        what = self.to if self.to == "dense" else f"{self.written} {self.to}"
        scales = f", scales of {self.scales} sites kept" if self.scales else ""
        return "\n".join([f"{found} -> {what}; {sizes}{scales}", *(f"  {note}" for note in self.notes)])


def convert(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    to: str = "dense",
    *,
    masks: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] = (),
    sparsity_config: bool = False,
    old_names: bool = False,
    max_shard_bytes: int = SHARD,
) -> Conversion:
    """Read a model from a format of another tool, or write one to it.

    One tensor at a time is in memory. Quantised weights become ordinary ones, code times scale in the type of the
    scales; the scales are kept in zeroskip_scales.safetensors, with which our int4 and int8 packing finds the codes
    again.

    Parameters
    ----------
    source : path
        A Hugging Face directory (safetensors, or pytorch_model.bin), or one weight file beside its config.json. What
        `zeroskip.compile` made is read as well.
    directory : path
        New or empty.
    to : str
        "dense" (plain transformers loads it), "sparse-bitmask" or "sparse-24-bitmask"; or "zeroskip", our packed
        directory, for which the whole model is in memory and config.json has to name its architecture.
    masks : path, or several
        Files of masks for the weights of `source`: MaskLLM's .npz, or .safetensors and .pt with masks under a name
        that one of the formats knows.
    sparsity_config : bool
        Write the section that compressed-tensors 0.9 to 0.14.0.1 and the engines of that time need to read the two
        bitmask formats. Newer engines refuse a model that has it.
    old_names : bool
        Write the names of release 0.8.1 and before, every tensor compressed (of sparse-24-bitmask: every one that is).
    max_shard_bytes : int
        A weight file is closed before it grows past this.

    Returns
    -------
    Conversion

    Raises
    ------
    ZeroskipError
        Naming the file, the tensor and the problem; nothing is then left of `directory`.
    """
    if to not in writable():
        raise ZeroskipError(f"unknown format {to!r}" + suggest(to, writable()))
    if (to == "dense" or Format.known[to].packs) and (sparsity_config or old_names):
        raise ZeroskipError(f"sparsity_config and old_names belong to the bitmask formats: leave them out with {to!r}")
    target = check_new(directory)
    if Format.known[to].packs:
        return _packed(source, target, to, masks, max_shard_bytes)
    stored = open_model(Path(source))
    before = sum(file.stat().st_size for file in set(stored.files.values()))
    for path in [masks] if isinstance(masks, str | os.PathLike) else masks:
        add_masks(stored, Path(path))
    found = _undone(stored)
    modules = Format.known[to].write(stored, old_names)
    with staged(target) as stage:
        config = {
            **stored.config,
            **({} if to == "dense" else {"quantization_config": _section(to, modules, sparsity_config)}),
        }
        write_json(stage / CONFIG, config)
        folder = stored.path if stored.path.is_dir() else stored.path.parent
        own = (meta.SIDECAR,) if not found and to == "dense" else ()
        copy_companions(folder, stage, ("generation_config.json", "*.py", *own))
        write_scales(stage, stored.scales)
        write_weights(stage, stored.tensors, [], max_shard_bytes)
        after = sum(file.stat().st_size for file in stage.glob("model*.safetensors"))
    return Conversion(found, to, len(modules), len(stored.scales), before, after, stored.notes)


def _packed(
    source: str | os.PathLike[str],
    target: Path,
    to: str,
    masks: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    max_shard_bytes: int,
) -> Conversion:
    """Write our packed directory, by way of one with ordinary weights beside it."""
    from zeroskip.convert.zeroskip import pack_smallest

    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as room:
        plain = Path(room) / "plain"
        done = convert(source, plain, masks=masks, max_shard_bytes=max_shard_bytes)
        if "architectures" not in read_json(plain / CONFIG):
            raise ZeroskipError(f"{source}: its {CONFIG} names no architecture; load it and run zeroskip.compile on it")
        model = load(plain)
        names, notes = pack_smallest(model)
        save(model, target, tokenizer=_Companions(plain), max_shard_bytes=max_shard_bytes)
    done.to, done.written = to, len(names)
    done.bytes_after = sum(file.stat().st_size for file in target.glob("model*.safetensors"))
    done.notes += notes
    return done


class _Companions:
    """The files beside the weights, where `save` takes a tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save_pretrained(self, directory: Path) -> None:
        copy_companions(self.folder, directory, ("generation_config.json", "*.py"))


def _undone(stored: Stored) -> dict[str, int]:
    """Turn everything into ordinary weights; return how many of them each format held."""
    section = stored.config.get("quantization_config", stored.config.get("compression_config"))
    if section is not None and not isinstance(section, dict):
        raise ZeroskipError(f"{stored.path}: quantization_config is a {type(section).__name__}, not an object")
    method = (section or {}).get("quant_method")
    if method == METHOD:
        return {METHOD: open_compiled(stored)}
    if method not in OURS:
        raise ZeroskipError(
            f"{stored.path}: is quantised by {method!r}, which is not read; convert it where it is from"
        )
    stored.config["quantization_config"] = section
    found = {name: format.read(stored) for name, format in Format.known.items() if format.reads}
    for key in ("quantization_config", "compression_config"):
        stored.config.pop(key, None)
    found = {name: count for name, count in found.items() if count}
    for name in stored.tensors:
        if name.rpartition(".")[2] in ENDINGS:
            raise stored.bad(name, "is left over: no format that is read here has it")
    for name in sorted(stored.masks & stored.tensors.keys()):
        near = suggest(name.removesuffix(".mask"), stored.tensors.keys() - stored.masks)
        raise stored.bad(name, f"is no mask of a tensor of {stored.path}{near}")
    spare = [name for name in stored.tensors if name.rpartition(".")[2] in ACTIVATIONS] if section or found else []
    for name in spare:
        stored.take(name)
    if spare:
        stored.notes.append(f"{len(spare)} scales of activations, such as {spare[0]}, were left out")
    return found


def _section(to: str, modules: list[str], sparsity_config: bool) -> dict[str, Any]:
    """What config.json says of a bitmask format.

    The method alone: without it transformers would find no weights and go on with random ones.
    """
    section: dict[str, Any] = {"quant_method": "compressed-tensors"}
    if sparsity_config:
        structure = "2:4" if to == "sparse-24-bitmask" else "unstructured"
        section["sparsity_config"] = {
            "format": to,
            "targets": modules,
            "ignore": [],
            "sparsity_structure": structure,
        }
    return section
