"""Dense layers that torch itself computes, in the forms that a plan may install.

`DenseLinear` is nn.Linear in another precision than the model's: activations are cast at its border. `OneDnnLinear`
keeps the weight only in oneDNN's prepacked order, so it costs no second copy; whoever asks for the weight (state_dict,
deepcopy, pickle, `.weight`) gets a dense one made from it, bit for bit. `RowLinear` is nn.Linear for models that are to
be batch-invariant: torch's libraries choose by the shape how to add, so it shows them one row at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from zeroskip.errors import ZeroskipError, first_line

__all__ = ["DTYPES", "DenseLinear", "OneDnnLinear", "RowLinear", "by_rows", "onednn_problem"]

Kind = TypeVar("Kind", bound=nn.Linear)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# An op of our own around torch's: as `mkldnn::_linear_pointwise` the call is rewritten by inductor, which expects the
# prepacked weight to be a frozen constant and fails; an unknown op with the same arguments passes through untouched.
_library = torch.library.Library("zeroskip", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("onednn_linear(Tensor x, Tensor weight, Tensor? bias, int m) -> Tensor")  # type: ignore[no-untyped-call]


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, m: int) -> Tensor:
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], m))
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def _onednn_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, m: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], m))


for _key in ("CPU", "MkldnnCPU"):
    _library.impl("onednn_linear", _onednn_linear, _key)  # type: ignore[no-untyped-call]
torch.library.register_fake("zeroskip::onednn_linear", _onednn_linear_fake, lib=_library)


@cache
def onednn_problem(values: str) -> str | None:
    """Return None if torch can prepack weights of this kind for oneDNN on this CPU, else the reason in one line."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "torch was built without oneDNN"
    try:
        weight, x = torch.ones(16, 16, dtype=DTYPES[values]), torch.ones(2, 16, dtype=DTYPES[values])
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        y = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return first_line(error)
    return None if bool((y == 16).all()) else "gave wrong numbers"


class DenseLinear(nn.Linear):
    """nn.Linear stored and computed in its own dtype, whatever dtype the activations have.

    x [..., k] -> y [..., m] in x's dtype. Inference only: the parameters require no gradient.
    """

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None, values: str) -> DenseLinear:
        """Make the layer from weight [m, k] and bias [m]; neither is modified or shared."""
        m, k = weight.shape
        layer = cls(k, m, bias=bias is not None, device="meta")
        dtype = DTYPES[values]
        layer.weight = nn.Parameter(weight.detach().to(dtype, copy=True).contiguous(), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def by_rows(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return `call` [1, k] -> [1, m] of each row of x [..., k] by itself, in memory of its own: as if it were alone."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = torch.cat([call(row.clone()) for row in torch.split(rows, 1)]) if len(rows) else call(rows)
    return y.reshape(*x.shape[:-1], y.shape[-1])


class RowLinear(nn.Linear):
    """nn.Linear that sees one row at a time: x [..., k] -> y [..., m], each row with the bits it gets alone."""

    @classmethod
    def of(cls, layer: nn.Linear) -> RowLinear:
        """Make the layer from an ordinary one; the parameters are shared, also with layers they are tied to."""
        return cls._sharing(layer, cls)

    def plain(self) -> nn.Linear:
        """Return the ordinary layer again."""
        return self._sharing(self, nn.Linear)

    @staticmethod
    def _sharing(layer: nn.Linear, kind: type[Kind]) -> Kind:
        new = kind(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        new.weight, new.bias = layer.weight, layer.bias
        return new.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        return by_rows(super().forward, x)


class OneDnnLinear(nn.Module):
    """A dense layer whose weight is prepacked for oneDNN.

    x [..., k] -> y [..., m] in x's dtype; computed in `values`. `tokens` is the token count that oneDNN is told to
    choose its order for; any other count works too. Inference only, CPU only.
    """

    _packed: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, values: str, tokens: int | None = None) -> None:
        super().__init__()
        problem = onednn_problem(values)
        if problem is not None:
            raise ZeroskipError(f"oneDNN cannot prepack {values} weights here: {problem}; use 'linear'")
        self.out_features, self.in_features = weight.shape
        self.values, self.tokens = values, tokens
        self._pack(weight)
        kept = None if bias is None else nn.Parameter(bias.detach().to(DTYPES[values], copy=True), requires_grad=False)
        self.register_parameter("bias", kept)

    @property
    def weight(self) -> Tensor:
        """The weight [m, k], a dense copy."""
        return self._packed.to_dense()

    @property
    def nbytes(self) -> int:
        """Bytes of the prepacked weight."""
        return int(torch.ops.mkldnn._nbytes(self._packed))

    def forward(self, x: Tensor) -> Tensor:
        dtype, bias = self._packed.dtype, self.bias
        if bias is not None and bias.dtype != dtype:  # after .half() and the like
            bias = bias.to(dtype)
        y: Tensor = torch.ops.zeroskip.onednn_linear(x.to(dtype), self._packed, bias, self.out_features)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, values={self.values!r}"

    def _pack(self, weight: Tensor) -> None:
        with torch.no_grad():
            dense = weight.detach().to(DTYPES[self.values]).contiguous()
            self._packed = torch.ops.mkldnn._reorder_linear_weight(dense, self.tokens)

    # The prepacked tensor has no storage that torch could copy, move or write: everything goes through the dense one.
    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state["_packed"] = self.weight
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack(state["_packed"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OneDnnLinear:
        if fn(torch.empty(0)).device.type != "cpu":
            raise ZeroskipError("a layer prepacked for oneDNN stays on the CPU; load the dense model to move it")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # a cast changes the bias only: the storage is the plan's choice
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        weight = state_dict.pop(prefix + "weight", None)
        if weight is None:
            missing_keys.append(prefix + "weight")
        elif tuple(weight.shape) != (self.out_features, self.in_features):
            error_msgs.append(f"{prefix}weight has shape {tuple(weight.shape)}, the layer {tuple(self.weight.shape)}")
        else:
            self._pack(weight)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
