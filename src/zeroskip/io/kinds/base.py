"""How one kind of layer is stored: what a file says of it, and the layer that is made of that again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from zeroskip.model import Site

__all__ = ["Kind", "Stored", "kind_of", "kind_stored", "kinds_in"]

Stored: TypeAlias = Mapping[str, Any]
"""What a file says of a layer beside its tensors: {"shape": [m, k], "kind": str, ..., "bias": dtype or None}."""


class Kind:
    """One kind of layer. Subclassing registers it.

    Attributes
    ----------
    kind : str
        The entry "kind" of its files.
    mark : str
        The entry that tells it from others of the same "kind", "" where there is none.
    layers : tuple of types
        Stored so, with all classes derived from them that no other kind names.
    """

    known: ClassVar[list[type[Kind]]] = []

    kind: ClassVar[str]
    mark: ClassVar[str] = ""
    layers: ClassVar[tuple[type[nn.Module], ...]]

    def __init_subclass__(cls) -> None:
        Kind.known.append(cls)

    @staticmethod
    def describe(layer: Any) -> dict[str, Any]:
        """Return what is stored of a layer besides its shape, kind and bias; plain values for JSON."""
        raise NotImplementedError

    @staticmethod
    def problem(site: Stored) -> str | None:
        """Return what is wrong with this kind's own entries of a layer that was read from a file, or None."""
        raise NotImplementedError

    @staticmethod
    def differs(site: Stored, module: nn.Module, inside: Site | None) -> str | None:
        """Return how a stored layer of any kind contradicts the model in what is this kind's own, or None.

        Parameters
        ----------
        site : mapping
        module : nn.Module
            Where the layer is to go; one to be taken apart where `inside`, one of its products, is given.
        """
        return None

    @staticmethod
    def empty(site: Stored, old: Any) -> nn.Module:
        """Return the layer, on the meta device, to be filled from the file in the place of `old`."""
        raise NotImplementedError

    @staticmethod
    def blobs(layer: Any) -> list[Tensor]:
        """Return the blobs that a filled layer holds, each int8 [nbytes]."""
        return []

    @staticmethod
    def settle(layer: Any, dtype: torch.dtype) -> None:
        """Make a filled layer, whose blobs are sound, ready for a model of this dtype; raise if it cannot be used."""


def kind_of(layer: nn.Module) -> type[Kind]:
    """Return how a layer that compiling put in is stored."""
    return next(kind for each in type(layer).__mro__ for kind in Kind.known if each in kind.layers)


def kinds_in(site: Stored) -> list[type[Kind]]:
    """Return the kinds whose entries a stored layer has, that without a mark first; none if it is of no known kind."""
    return [kind for kind in Kind.known if kind.kind == site.get("kind") and (not kind.mark or kind.mark in site)]


def kind_stored(site: Stored) -> type[Kind]:
    """Return the kind that a stored layer, which has been checked, is of."""
    kinds = kinds_in(site)
    return next((kind for kind in kinds if kind.mark), kinds[0])
