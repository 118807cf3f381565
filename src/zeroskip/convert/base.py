"""A foreign format as one pass over the tensors of a model, by name; one format is one file, subclassing registers it.

A model on disk is a `Stored`: tensors that are not read before they are written. A format that reads looks for its own
names (`module.weight_packed` and the like), takes them out and puts the ordinary weight in. So formats that stack (a
bitmask over integers) need not know each other: each undoes its own layer, in the order of `Format.known`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from zeroskip.errors import ZeroskipError
from zeroskip.io.container import Later

__all__ = ["Format", "Stored", "later", "readable", "shape_in", "writable"]

LARGEST = 1 << 31  # a dimension beyond this is damage


@dataclass
class Stored:
    """A model as its files hold it.

    Attributes
    ----------
    path : Path
        The directory or file it came from.
    config : dict
        config.json, modified as layers of formats are undone.
    tensors : dict of str to Later
    files : dict of str to Path
        Where each tensor came from, for messages.
    scales : dict of str to Tensor
        By site: [1, out, ceil(in / group_size)], for weights that are integers times these.
    masks : set of str
        The tensors that came from files of masks.
    sparse : set of str
        The tensors that came out of a sparse format or a mask.
    notes : list of str
        What the user should know.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Later]
    files: dict[str, Path]
    scales: dict[str, Tensor] = field(default_factory=dict)
    masks: set[str] = field(default_factory=set)
    sparse: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def bad(self, name: str, problem: str) -> ZeroskipError:
        """Return the error that says what is wrong with a tensor of this name."""
        return ZeroskipError(f"{self.files.get(name, self.path)}: {name}: {problem}")

    def take(self, name: str) -> Later:
        """Take a tensor out."""
        return self.tensors.pop(name)

    def put(self, name: str, value: Later, source: str) -> None:
        """Put in a tensor that was made from `source`."""
        if name in self.tensors:
            raise self.bad(source, f"and {name} are both there; which of them is meant?")
        self.tensors[name] = value
        self.files[name] = self.files.get(source, self.path)

    def families(self, marker: str, needs: tuple[str, ...], may: tuple[str, ...] = ()) -> Iterator[tuple[str, Parts]]:
        """Take out and yield (prefix, {part: tensor}) for every tensor named ``prefix.marker``.

        Raises
        ------
        ZeroskipError
            If one of `needs` is missing.
        """
        tail = "." + marker
        for prefix in [name.removesuffix(tail) for name in self.tensors if name.endswith(tail)]:
            for part in needs:
                if f"{prefix}.{part}" not in self.tensors:
                    raise self.bad(prefix + tail, f"there is no {prefix}.{part} beside it")
            names = {part: f"{prefix}.{part}" for part in (marker, *needs, *may)}
            yield prefix, {part: self.take(name) for part, name in names.items() if name in self.tensors}


Parts = dict[str, Later]


class Format:
    """A way to store weights. A subclass with a `name` registers itself.

    Attributes
    ----------
    reads, writes : bool
    packs : bool
        Whether it is written from a model and not tensor by tensor.
    """

    known: ClassVar[dict[str, Format]] = {}
    name: ClassVar[str]
    reads: ClassVar[bool] = True
    writes: ClassVar[bool] = False
    packs: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            Format.known[cls.name] = cls()

    def read(self, stored: Stored) -> int:
        """Replace what this format stores by ordinary weights, in place; return how many there were."""
        raise NotImplementedError

    def write(self, stored: Stored, old_names: bool) -> list[str]:
        """Replace ordinary weights by what this format stores, in place; return the modules whose weights those are."""
        raise NotImplementedError


def readable() -> list[str]:
    """The names of the formats that are recognised."""
    return [name for name, format in Format.known.items() if format.reads]


def writable() -> list[str]:
    """The names that `convert` takes as `to`."""
    return [name for name, format in Format.known.items() if format.writes]


def later(like: Later, shape: tuple[int, ...], make: Callable[[], Tensor], dtype: torch.dtype | None = None) -> Later:
    """A tensor to be made later, of the dtype of `like` unless another is given."""
    return Later(dtype or like.dtype, shape, make)


def shape_in(stored: Stored, name: str, tensor: Later, dims: int | None = None) -> tuple[int, ...]:
    """Read a shape that is stored as a tensor.

    Raises
    ------
    ZeroskipError
        If it is not a few positive whole numbers, `dims` of them where given.
    """
    whole = not tensor.dtype.is_floating_point and tensor.dtype not in (torch.bool, torch.complex64)
    count = 1
    for size in tensor.shape:
        count *= size
    if not whole or not 1 <= count <= 8 or (dims is not None and count != dims):
        raise stored.bad(name, f"a shape is {dims or 'a few'} whole numbers, not {tensor.dtype} {list(tensor.shape)}")
    shape = tuple(int(size) for size in tensor.make().reshape(-1))
    if not all(0 < size < LARGEST for size in shape):
        raise stored.bad(name, f"{list(shape)} is not a shape")
    return shape
