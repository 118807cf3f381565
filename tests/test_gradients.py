"""Packed layers have no gradient: who asks for one is told, on the way back, and nobody else is."""

from __future__ import annotations

import pytest
import torch
from oracle import example, random
from torch import nn

import zeroskip as zs
from zeroskip.conv_ops import convolve
from zeroskip.nn import PackedLinear, Siblings

M, K = 37, 64


@pytest.mark.parametrize("what", ["function", "bias", "layer", "siblings", "convolution"])
def test_a_gradient_is_refused_in_one_line_and_nothing_else_is(what: str) -> None:
    packed = zs.pack(example("csr", M, K, "fp32", 0), "csr")
    layer, x = PackedLinear.from_packed(packed), random(3, K).requires_grad_()
    if what == "siblings":
        Siblings([layer, PackedLinear.from_packed(packed)]).join()
    y = {
        "function": lambda: zs.linear(packed, x),
        "bias": lambda: zs.linear(packed, x.detach(), torch.zeros(M).requires_grad_()),
        "layer": lambda: layer(x),
        "siblings": lambda: layer(x),
        "convolution": lambda: convolve(x.view(3, 1, K), packed.blob, None, M, [1, 1, 1, 0]).view(3, M),
    }[what]()
    assert torch.equal(y, zs.linear(packed, x.detach()))
    with pytest.raises(zs.ZeroskipError, match=r"a packed layer has no gradient: .* torch\.no_grad\(\)$"):
        y.sum().backward()
    head = nn.Linear(M, 1)
    head(layer(x.detach())).sum().backward()
    assert head.weight.grad is not None
