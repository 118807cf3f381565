"""Modules without kernel code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from zeroskip.errors import ZeroskipError
from zeroskip.formats.base import Packed
from zeroskip.native import is_plain
from zeroskip.ops import ACTIVATIONS, Part, activation_code, call, call_by, call_many, call_plain

__all__ = ["PackedLinear", "Siblings"]


class PackedLinear(nn.Module):
    """A linear layer whose `weight` is a blob: int8 [nbytes], untouched by `.half()`, `.to()`, `deepcopy`, `save`.

    Parameters
    ----------
    in_features, out_features
        k and m of the weight.
    nbytes
        Length of the blob.
    bias
        Whether there is a bias [m].
    activation
        None or a name of `zeroskip.ops.ACTIVATIONS`, fused into the kernel.

    Attributes
    ----------
    siblings : Siblings or None
        Layers that are fed the same tensor and are computed in one call with this one.
    then : nn.Module or None
        What stands in the place of an activation of the model that this layer computes (`fold`).
    kernel : str or None
        The kernel for every number of tokens; None leaves it to the tuning table. A batch-invariant plan sets it.
    """

    siblings: Siblings | None = None
    then: nn.Module | None = None
    kernel: str | None = None

    def __init__(
        self, in_features: int, out_features: int, nbytes: int, bias: bool = False, activation: str | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        self._act = activation_code(activation)
        self.weight = nn.Parameter(torch.empty(nbytes, dtype=torch.int8), requires_grad=False)
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None)

    @classmethod
    def from_packed(cls, packed: Packed, bias: Tensor | None = None, activation: str | None = None) -> PackedLinear:
        """Wrap a packed weight; it and the bias are shared, not copied."""
        m, k = packed.shape
        if bias is not None and bias.shape != (m,):
            raise ZeroskipError(f"bias has shape {list(bias.shape)}, expected [{m}]")
        module = cls(k, m, 0, activation=activation)
        module.weight = nn.Parameter(packed.blob, requires_grad=False)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return module

    def fold(self, activation: str | None, then: nn.Module | None) -> None:
        """Compute an activation of the model too, in whose place `then` stands; None: only the layer's own again."""
        self._act = activation_code(activation or self.activation)
        self.__dict__["then"] = then  # no child: it has its own place in the model

    @property
    def packed(self) -> Packed:
        """The weight with what its header says."""
        return Packed.from_blob(self.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        siblings = self.siblings
        if siblings is not None and not torch.compiler.is_compiling():
            return siblings.forward(self, x)
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """Return x [..., k] times the weight, with bias and activation, by the layer's own kernel if it has one."""
        own, kernel = self._parameters, self.kernel  # self.weight and self.bias would take a microsecond to find
        if is_plain(x):
            return call_plain(x, cast(Tensor, own["weight"]), own["bias"], self.out_features, self._act, kernel)
        if kernel is None:
            y: Tensor = call(x, own["weight"], own["bias"], self.out_features, self._act)
        else:
            y = call_by(x, own["weight"], own["bias"], self.out_features, self._act, kernel)
        return y

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        activation = ACTIVATIONS[self._act]
        shape += f", activation={activation}" if activation != "none" else ""
        return shape + (f", kernel={self.kernel}" if self.kernel else "")


class Siblings:
    """Packed layers that a model feeds the same tensor (queries, keys, values), all computed when the first is called.

    The others then find their result: for the very tensor that the first one got, once, and not after something wrote
    into it (inference tensors alone do not tell). Otherwise each computes its own, so nothing depends on the model's
    keeping to what was traced. Weights stay where they are, each layer's its own; under torch.compile the layers are
    computed apart.

    Parameters
    ----------
    layers : sequence of PackedLinear
        In the order of their calls.
    """

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        self.layers = tuple(layers)
        # One tuple, replaced as a whole: threads that run the model at once find their own tensor in it or compute.
        self._last: tuple[Tensor, int, dict[PackedLinear, Tensor]] | None = None

    def join(self) -> None:
        """Let the layers be computed together from now on."""
        for layer in self.layers:
            layer.siblings = self

    def part(self) -> None:
        """Let each layer be computed by itself again."""
        for layer in self.layers:
            layer.siblings = None

    def forward(self, layer: PackedLinear, x: Tensor) -> Tensor:
        """Return the output of one of the layers for x [..., k]."""
        if layer is self.layers[0]:
            outputs = call_many(x, [_part(each) for each in self.layers])
            self._last = (x, _version(x), dict(zip(self.layers[1:], outputs[1:], strict=True)))
            return outputs[0]
        last = self._last
        if last is not None and last[0] is x and last[1] == _version(x):
            y = last[2].pop(layer, None)  # no other caller may write into what this one is given
            if not last[2]:
                self._last = None  # nothing of the activations is kept
            if y is not None:
                return y
        return call_many(x, [_part(layer)])[0]

    def __getstate__(self) -> dict[str, tuple[PackedLinear, ...]]:
        return {"layers": self.layers}

    def __setstate__(self, state: dict[str, tuple[PackedLinear, ...]]) -> None:
        self.layers, self._last = state["layers"], None


def _version(x: Tensor) -> int:
    """Return how often something wrote into a tensor; an inference tensor does not count that."""
    return 0 if x.is_inference() else x._version


def _part(layer: PackedLinear) -> Part:
    own = layer._parameters
    return cast(Tensor, own["weight"]), own["bias"], layer.out_features, layer._act, layer.kernel
