"""Without any model: pack one weight, multiply by it, unpack it again."""

import sys

import torch

import zeroskip as zs

weight = torch.randn(256, 512)
weight[torch.rand_like(weight) < 0.7] = 0.0  # 70 % zeros anywhere

packed = zs.pack(weight, format="bitmask", values="fp32")
x = torch.randn(8, 512)
error = (zs.linear(packed, x) - x @ weight.T).abs().max()
sys.stdout.write(f"{packed}, largest difference {error:.1e} on {zs.isa()}\n")
assert torch.equal(zs.unpack(packed), weight)
