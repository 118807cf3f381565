"""nn.MultiheadAttention taken apart: its projections are layers of their own, attention is torch's function.

y = out_proj(softmax(q k^T / sqrt(head)) v),  q, k, v = the projections of query, key, value
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from zeroskip.errors import ZeroskipError
from zeroskip.sites.attention import APART, AttentionAdapter
from zeroskip.split_layers import Split, Stack, shell_of

__all__ = ["SplitAttention"]


class SplitAttention(Split):
    """nn.MultiheadAttention whose projections are its children `in_proj_weight` (or three) and `out_proj`.

    Takes and returns what the layer did. Inference only; no nested tensors.
    """

    in_proj_bias = None  # with a bias nn.TransformerEncoderLayer would read the weights itself

    def __init__(self, module: nn.MultiheadAttention, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(module, parts)
        self.embed_dim, self.num_heads, self.batch_first = module.embed_dim, module.num_heads, module.batch_first
        self._qkv_same_embed_dim, self.head_dim = module._qkv_same_embed_dim, module.head_dim
        own = AttentionAdapter.parameters(module)
        self.__dict__["shell"] = shell_of(module, *own, "in_proj_bias", "out_proj.bias")
        for name, part in parts.items():
            self.add_module(name.removesuffix(".weight"), part)

    @staticmethod
    def takes(module: nn.Module) -> bool:
        return AttentionAdapter.matches(module)

    @staticmethod
    def obstacle(module: Any) -> str | None:
        if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
            return "it adds keys and values of its own"
        return None

    @staticmethod
    def products(module: Any) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        for name in AttentionAdapter.parameters(module):
            weight = AttentionAdapter.view(module, name, module.get_parameter(name).detach())
            bias = AttentionAdapter.bias(module, name)
            if name == "in_proj_weight":
                found[name] = Stack(weight, None if bias is None else bias.view(3, -1))
                continue
            layer = nn.Linear(weight.shape[2], weight.shape[1], bias is not None, device="meta", dtype=weight.dtype)
            layer.weight = nn.Parameter(weight[0], requires_grad=False)
            if bias is not None:
                layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
            found[name] = layer
        return found

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.is_nested or query.dim() not in (2, 3):
            raise ZeroskipError("a compiled nn.MultiheadAttention takes [length, batch, width], or without a batch")
        batched = query.dim() == 3
        given: tuple[Tensor, ...] = (query, key, value)
        if not batched:
            given = tuple(x.unsqueeze(0) for x in given)
        elif not self.batch_first:
            given = tuple(x.transpose(0, 1) for x in given)
        q, k, v = (self._heads(self._project(i, x)) for i, x in enumerate(given))
        mask = self._mask(q, k, attn_mask, key_padding_mask, is_causal)
        weights: Tensor | None = None
        if need_weights:
            scores = (q / math.sqrt(self.head_dim)) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            y = scaled_dot_product_attention(q, k, v, mask)
        out: Any = self._modules["out_proj"]
        y = out(y.transpose(1, 2).flatten(2))
        if not batched:
            return y[0], weights
        return y if self.batch_first else y.transpose(0, 1), weights

    def _project(self, which: int, x: Tensor) -> Tensor:
        own: Any = self._modules
        y: Tensor = own["in_proj_weight"](x, which) if "in_proj_weight" in own else own[APART[which]](x)
        return y

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, length, width] as [batch, heads, length, head]."""
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(
        self, q: Tensor, k: Tensor, attn_mask: Tensor | None, padding: Tensor | None, is_causal: bool
    ) -> Tensor | None:
        """Return what is added to the scores [batch, heads, queries, keys], or None."""
        if is_causal and attn_mask is None:
            raise ZeroskipError("is_causal is a hint: give attn_mask with it")
        batch, heads, queries, keys = *q.shape[:3], k.shape[2]
        masks: list[Tensor] = []
        if attn_mask is not None:
            masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.view(batch, heads, queries, keys))
        if padding is not None:
            masks.append(padding.view(-1, 1, 1, keys))
        total: Tensor | None = None
        for mask in masks:
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(mask, -math.inf)
            total = mask.to(q.dtype) if total is None else total + mask
        return total

    def dense(self, weights: Mapping[str, tuple[Tensor, Tensor | None]]) -> nn.Module:
        module: Any = shell_of(self.shell, "out_proj.bias")
        biases: list[Tensor] = []
        for name, (weight, bias) in weights.items():
            whole = nn.Parameter(weight.flatten(0, -2) if name == "in_proj_weight" else weight, requires_grad=False)
            if name == "out_proj":
                module.out_proj._parameters["weight"] = whole
                if bias is not None:
                    module.out_proj._parameters["bias"] = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
                continue
            module._parameters[name] = whole
            if bias is not None:
                biases.append(bias.detach().to(weight.dtype).flatten())
        if biases:
            module._parameters["in_proj_bias"] = nn.Parameter(torch.cat(biases), requires_grad=False)
        return module  # type: ignore[no-any-return]
