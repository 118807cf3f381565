"""Modules without kernel code."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zeroskip.errors import ZeroskipError
from zeroskip.formats.base import Packed
from zeroskip.ops import activation_code, call

__all__ = ["PackedLinear"]


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
    """

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

    @property
    def packed(self) -> Packed:
        """The weight with what its header says."""
        return Packed.from_blob(self.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        own = self._parameters  # self.weight and self.bias would take nn.Module a microsecond to find
        y: Tensor = call(x, own["weight"], own["bias"], self.out_features, self._act)
        return y

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return shape + (f", activation={self.activation}" if self.activation else "")
