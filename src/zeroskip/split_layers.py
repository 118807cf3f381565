"""Layers taken apart: each of their products becomes a layer of its own, which a plan may pack.

One kind is one subclass of `Split`. Its children that hold weights are named as the sites are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from zeroskip.formats.base import Packed
from zeroskip.ops import call

__all__ = ["PackedStack", "Split", "Stack", "aligned", "shell_of", "split_of"]


class Split(nn.Module):
    """What takes the place of a layer whose products are its children."""

    kinds: ClassVar[list[type[Split]]] = []

    def __init_subclass__(cls) -> None:
        Split.kinds.append(cls)

    def __init__(self, module: Any, parts: Mapping[str, nn.Module]) -> None:
        """Take the place of `module`, of which only what is no weight is kept; `parts` are by their parameters."""
        super().__init__()

    shell: Any = None  # what of the layer is no weight, for those that need it

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The products by name."""
        return dict(self.named_children())

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether this kind takes such a layer apart."""
        raise NotImplementedError

    @staticmethod
    def obstacle(module: Any) -> str | None:
        """Return why this layer of the kind cannot be taken apart, or None."""
        return None

    @staticmethod
    def products(module: Any) -> dict[str, nn.Module]:
        """Return the products of a layer by the names of their parameters; weights are shared, not copied."""
        raise NotImplementedError

    def dense(self, weights: Mapping[str, tuple[Tensor, Tensor | None]]) -> nn.Module:
        """Return the layer again, with these weights and biases by the names of its children."""
        raise NotImplementedError


def split_of(module: nn.Module) -> type[Split] | None:
    """Return the kind that takes a layer apart, None if there is none."""
    return next((kind for kind in Split.kinds if kind.takes(module)), None)


def shell_of(module: nn.Module, *without: str) -> nn.Module:
    """Return a shallow copy of a layer with these parameters (dotted: of a child) set to None."""
    shell = module.__new__(type(module))
    shell.__dict__.update(module.__dict__)
    for place in ("_parameters", "_buffers", "_modules"):
        shell.__dict__[place] = dict(module.__dict__[place])
    for name in without:
        head, _, rest = name.partition(".")
        if rest:
            shell._modules[head] = shell_of(shell.get_submodule(head), rest)
        else:
            shell._parameters[name] = None
    return shell


class _NoTensor(nn.Module):
    """Stands where torch may look for a weight to compute with itself, and gives it a reason not to."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError(f"{function} computes with a weight that is packed")


class Stack(_NoTensor):
    """Several products of one shape: (x [..., k], which) -> [..., m].

    Parameters
    ----------
    weight : Tensor
        [count, m, k], shared.
    bias : Tensor, optional
        [count, m].
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape[1:]
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        kept = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", kept)

    def forward(self, x: Tensor, which: int) -> Tensor:
        bias: Any = self.bias
        return linear(x, self.weight[which], None if bias is None else bias[which])

    def extra_repr(self) -> str:
        return f"{len(self.weight)} x in_features={self.in_features}, out_features={self.out_features}"


class PackedStack(_NoTensor):
    """A stack whose `weight` is its blobs one after another: int8 [nbytes].

    Parameters
    ----------
    in_features, out_features
        k and m of each weight.
    sizes
        Bytes of each blob, multiples of 64.
    bias
        Whether there is a bias [count, m].
    """

    def __init__(self, in_features: int, out_features: int, sizes: Sequence[int], bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.sizes = in_features, out_features, tuple(sizes)
        self._ends = [0]
        for size in self.sizes:
            self._ends.append(self._ends[-1] + size)
        self.weight = nn.Parameter(torch.empty(self._ends[-1], dtype=torch.int8), requires_grad=False)
        empty = torch.zeros(len(self.sizes), out_features)
        self.register_parameter("bias", nn.Parameter(empty, requires_grad=False) if bias else None)

    @classmethod
    def of(cls, packed: Sequence[Packed], bias: Tensor | None) -> PackedStack:
        """Make the stack of packed weights of one shape; they are copied, the bias [count, m] is shared."""
        m, k = packed[0].shape
        stack = cls(k, m, [each.nbytes for each in packed])
        stack.weight = nn.Parameter(aligned(torch.cat([each.blob for each in packed])), requires_grad=False)
        if bias is not None:
            stack.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return stack

    def blob(self, which: int) -> Tensor:
        """Return the blob of one weight, a view."""
        return self._parameters["weight"][self._ends[which] : self._ends[which + 1]]  # type: ignore[index]

    @property
    def packed(self) -> list[Packed]:
        """The weights with what their headers say."""
        return [Packed.from_blob(self.blob(i).detach()) for i in range(len(self.sizes))]

    def forward(self, x: Tensor, which: int) -> Tensor:
        bias = self._parameters["bias"]
        y: Tensor = call(x, self.blob(which), None if bias is None else bias[which], self.out_features, 0)
        return y

    def extra_repr(self) -> str:
        return f"{len(self.sizes)} x in_features={self.in_features}, out_features={self.out_features}"


def aligned(blob: Tensor) -> Tensor:
    """Return int8 [nbytes] at an address that is a multiple of 64; itself where it is so."""
    if blob.data_ptr() % 64 == 0:
        return blob
    room = torch.empty(blob.numel() + 64, dtype=torch.int8)
    start = -room.data_ptr() % 64
    room[start : start + blob.numel()] = blob
    return room[start : start + blob.numel()]
