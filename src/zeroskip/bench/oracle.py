"""The float64 oracle: what a linear layer should give, and how far a kernel may be from it.

The bound per element is (k eps + u_w + u_x) (|W| |x| + |b|) + u_y |y| + tiny: accumulation in fp32 over k terms, the
rounding of weights and activations where they are stored or multiplied in bf16, the rounding of the result to its
dtype. `tiny` covers the units that flush subnormals. A kernel of integers is held against the weight that its codes
say; it rounds each group of activations to 127 steps of the largest, which adds the sum over groups of
(max |x| / 254) (sum |w|).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["Oracle"]

EPS32 = 2.0**-23
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
TINY = 1e-30
FULL_FLOPS = 4e9  # above this only some of the tokens are checked in float64
SOME_TOKENS = 16


class Oracle:
    """The right answer for one weight and one batch of activations.

    Parameters
    ----------
    weight : Tensor [m, k]
        The dense weight, before any rounding.
    bias : Tensor [m] or None
    x : Tensor [tokens, k]
        All tokens are checked for finiteness; for large problems the values of the first and last tokens and some in
        between are compared.
    group_size : int, optional
        Of a weight stored as integers: inputs that share a scale.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, x: Tensor, group_size: int | None = None) -> None:
        m, k = weight.shape
        tokens = x.shape[0]
        self.rows = _some(tokens) if 2.0 * m * k * tokens > FULL_FLOPS else torch.arange(tokens)
        w64, x64 = weight.double(), x[self.rows].double()
        self.y = x64 @ w64.t()
        self.magnitude = x64.abs() @ w64.abs().t()
        if bias is not None:
            self.y += bias.double()
            self.magnitude += bias.double().abs()
        self.rounding: Tensor | float = 0.0
        if group_size is not None:
            steps = _groups(x64, group_size).amax(2) / 254
            self.rounding = 1.001 * steps @ _groups(w64, group_size).sum(2).t()
        self.terms = k + 1
        self.dtype = x.dtype
        # Inputs that fp16 holds exactly may still be multiplied as bf16; fp32 inputs only if bf16 was asked for.
        self.x_unit = UNIT[x.dtype] if x.dtype in (torch.bfloat16, torch.float16) else 0.0

    def problem(self, y: Tensor, values: str) -> str | None:
        """Return None if `y` [tokens, m] is right for weights stored as `values`, else what is wrong with it."""
        expected = (self.y.shape[1],)
        if y.dim() != 2 or y.shape[1:] != expected or y.dtype != self.dtype:
            return f"gave {y.dtype} {tuple(y.shape)}, expected {self.dtype} with {expected[0]} columns"
        if not bool(torch.isfinite(y).all()):
            return "gave NaN or Inf"
        # Two roundings each, of weight and activation, where anything below fp32 was asked for.
        low = 0.0 if values == "fp32" else 2 * UNIT[torch.bfloat16]
        relative = self.terms * EPS32 + low + self.x_unit
        bound = (
            relative * self.magnitude
            + self.rounding
            + UNIT[self.dtype] * (self.y.abs() + relative * self.magnitude)
            + TINY
        )
        excess = ((y[self.rows].double() - self.y).abs() / bound).max().item() if y.numel() else 0.0
        return None if excess <= 1.0 else f"is off by {excess:.3g} times the bound"


def _groups(matrix: Tensor, size: int) -> Tensor:
    """|matrix| [rows, k] by groups of columns: [rows, groups, size]."""
    return pad(matrix.abs(), (0, -matrix.shape[1] % size)).view(matrix.shape[0], -1, size)


def _some(tokens: int) -> Tensor:
    if tokens <= SOME_TOKENS:
        return torch.arange(tokens)
    edge = SOME_TOKENS // 4
    inner = torch.linspace(edge, tokens - edge - 1, SOME_TOKENS - 2 * edge).long()
    chosen: Tensor = torch.unique(torch.cat([torch.arange(edge), inner, torch.arange(tokens - edge, tokens)]))
    return chosen
