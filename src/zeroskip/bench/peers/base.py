"""What a peer is. Its file is read by this package and, without the package, by the worker in the peer's environment.

So a peer's file imports at its top nothing but the standard library, numpy and this module; the library that it is
about is imported when it is asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

__all__ = ["Floats", "Mode", "Peer", "Work", "get", "int4_groups", "names"]

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

_registry: dict[str, type[Peer]] = {}


@dataclass(frozen=True)
class Mode:
    """One way in which a peer stores a weight and computes with it; says how far from float64 it may be.

    Attributes
    ----------
    name : str
        Such as ``'int4'``.
    bits : int
        Stored bits of a weight, about.
    values : "fp32", "bf16" or "fp16"
        The lowest precision in which numbers are multiplied.
    activation_group : int or None
        Inputs that share one scale where activations are rounded to int8.
    """

    name: str
    bits: int
    values: str = "fp32"
    activation_group: int | None = None


@dataclass
class Work:
    """A weight loaded several times, ready to be multiplied with.

    Attributes
    ----------
    run : function x [tokens, k] -> list of y [tokens, m]
        fp32 in, fp32 out. Multiplies with every copy once; the results are one y a copy, or one y for all.
    copies : int
        Multiplications of one `run`.
    nbytes : int
        Bytes of one stored weight.
    stands : array [m, k] or None
        The weight that the stored one stands for, where it was rounded.
    holds : object
        What has to live as long: arrays that the library reads without knowing it.
    """

    run: Callable[[Floats], list[Floats]]
    copies: int
    nbytes: int
    stands: Floats | None = None
    holds: object = None


class Peer(ABC):
    """One library. A subclass with a `name` registers itself.

    Attributes
    ----------
    name : str
        Also the name of its environment.
    modes : tuple of Mode
        The ways in which it is measured.
    requires : tuple of str
        What pip installs into its environment; none: this process's own environment serves.
    build : tuple of (variable, value)
        The environment of pip, where something is built from source.
    python : str or None
        The only version of Python that has wheels of it.
    fixed_tokens : bool
        Whether it loads a weight for one token count only.
    model_modes : tuple of str
        The ways in which it runs a whole language model; none: it runs products only.
    """

    name: ClassVar[str]
    modes: ClassVar[tuple[Mode, ...]]
    requires: ClassVar[tuple[str, ...]] = ()
    build: ClassVar[tuple[tuple[str, str], ...]] = ()
    python: ClassVar[str | None] = None
    fixed_tokens: ClassVar[bool] = False
    model_modes: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        _registry[cls.name] = cls

    @abstractmethod
    def version(self) -> str:
        """Import the library and return its version."""

    @abstractmethod
    def load(self, mode: str, weight: Floats, copies: int, threads: int, tokens: int) -> Work:
        """Load `weight` [m, k] `copies` times, each with memory of its own.

        Raises
        ------
        Exception
            Of any kind where the library cannot do this; its first line is shown.
        """

    def make_models(self, folder: Path, into: Path) -> dict[str, int]:
        """Write a Hugging Face directory's model as the peer's own files: {mode: bytes of its file}."""
        raise ValueError("it runs no whole models")

    def open_model(self, mode: str, into: Path, threads: int) -> Any:
        """Load one of those; the answer has what `llama_model.LlamaModel` has."""
        raise ValueError("it runs no whole models")


def names() -> list[str]:
    """The names of all peers."""
    return list(_registry)


def get(name: str) -> type[Peer]:
    """The peer of this name; KeyError if there is none."""
    return _registry[name]


def int4_groups(weight: Floats, group: int) -> tuple[Codes, Floats, Floats]:
    """Round `weight` [m, k] to codes 1..15 around 8, one scale for `group` inputs of a row (the last may be short).

    The scales are exact in fp16, which some libraries store.

    Returns
    -------
    codes [m, groups, group] uint8, scales [m, groups] fp32, and the weight [m, k] that they stand for. Inputs beyond
    the last have code 8, which stands for 0.
    """
    m, k = weight.shape
    groups = -(-k // group)
    padded: Floats = np.zeros((m, groups * group), np.float32)
    padded[:, :k] = weight
    blocks = padded.reshape(m, groups, group)
    scales = (np.abs(blocks).max(axis=2) / np.float32(7)).astype(np.float16).astype(np.float32)
    divisor = np.where(scales == 0, np.float32(1), scales)[:, :, None]
    codes = np.clip(np.rint(blocks / divisor), -7, 7).astype(np.int8)
    stands = (codes * scales[:, :, None]).reshape(m, -1)[:, :k]
    return (codes + 8).astype(np.uint8), scales, np.ascontiguousarray(stands, np.float32)


def nbytes(*arrays: Any) -> int:
    """Return the bytes of numpy arrays together."""
    return sum(int(array.nbytes) for array in arrays)
