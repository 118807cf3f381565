"""The dense rivals of a site that torch offers; our own `dense` format is a format like any other.

A rival is one class: it says for which storage it is available, and builds the module that a plan would install.
MKL's prepacked linear is not among them: its packing serves one token count only, and for any other it computes as
nn.Linear does. It belongs to the comparison under torch.compile.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from zeroskip.dense_layers import DTYPES, DenseLinear, OneDnnLinear, onednn_problem

__all__ = ["Linear", "OneDnn", "Rival", "rivals"]


class Rival:
    """One way in which torch computes a dense layer."""

    name: ClassVar[str]
    kinds: ClassVar[dict[str, type[Rival]]] = {}

    def __init_subclass__(cls) -> None:
        Rival.kinds[cls.name] = cls

    @staticmethod
    def problem(values: str) -> str | None:
        """Return None where this rival can run with such storage, else the reason in one line."""
        raise NotImplementedError

    @staticmethod
    def build(weight: Tensor, bias: Tensor | None, values: str, tokens: int) -> nn.Module:
        """Return a module with its own copy of the weight [m, k].

        `tokens` is the largest count it must be good at.
        """
        raise NotImplementedError


class Linear(Rival):
    """nn.Linear in the given precision (in the model's own it is the layer as it stands, which needs no building)."""

    name = "linear"

    @staticmethod
    def problem(values: str) -> str | None:
        return None if values in DTYPES else f"torch has no nn.Linear in {values}"

    @staticmethod
    def build(weight: Tensor, bias: Tensor | None, values: str, tokens: int) -> nn.Module:
        return DenseLinear.pack(weight, bias, values)


class OneDnn(Rival):
    """oneDNN with the weight prepacked."""

    name = "onednn"

    @staticmethod
    def problem(values: str) -> str | None:
        return onednn_problem(values) if values in DTYPES else f"torch has no prepacked oneDNN linear in {values}"

    @staticmethod
    def build(weight: Tensor, bias: Tensor | None, values: str, tokens: int) -> nn.Module:
        return OneDnnLinear(weight, bias, values, tokens)


def rivals() -> dict[str, type[Rival]]:
    """Return the dense rivals by name."""
    return dict(Rival.kinds)
