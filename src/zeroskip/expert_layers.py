"""Stacked experts taken apart: tokens are sorted by their expert, and each expert that has some is one product.

y[t] = sum over the experts e of token t of p[t, e] down_e(gate(up_e(x[t])))
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zeroskip.sites.experts import ExpertsAdapter, transposed
from zeroskip.split_layers import PackedStack, Split, Stack, shell_of

__all__ = ["SplitExperts"]

PROJECTIONS = (("gate_up_proj", "up_proj"), ("down_proj",))
ARGUMENTS = 3  # hidden states, [tokens, k] the experts of each token, [tokens, k] their weights


class SplitExperts(Split):
    """Experts of transformers whose stacks are its children, each packed or not.

    (x [tokens, hidden], experts [tokens, k], weights [tokens, k]) -> [tokens, hidden]. Inference only.
    """

    def __init__(self, module: Any, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(module, parts)
        self.num_experts: int = module.num_experts
        self.transposed = transposed(module)
        own = [name for name in module._parameters if name.removesuffix("_bias") in parts]
        self.__dict__["shell"] = shell_of(module, *own)  # no child: transformers would initialise what it has not
        for name, part in parts.items():
            self.add_module(name, part)

    @staticmethod
    def takes(module: nn.Module) -> bool:
        return ExpertsAdapter.matches(module)

    @staticmethod
    def obstacle(module: Any) -> str | None:
        own, rest = set(ExpertsAdapter.parameters(module)), dict(module._parameters)
        if len(own) != 2 or not any({up, "down_proj"} == own for up in PROJECTIONS[0]):
            return f"its stacks are {', '.join(sorted(own))}, not gate_up_proj or up_proj and down_proj"
        left = [name for name in rest if rest[name] is not None and name.removesuffix("_bias") not in own]
        given = list(inspect.signature(inspect.unwrap(type(module).forward)).parameters)[1:]
        if left or len(given) != ARGUMENTS or getattr(module, "has_post_expert_norm", False):
            return f"{type(module).__name__} computes in a way of its own"
        return "its experts are spread over processes" if getattr(module, "_is_expert_parallel", False) else None

    @staticmethod
    def products(module: Any) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        for name in ExpertsAdapter.parameters(module):
            weight = ExpertsAdapter.view(module, name, module._parameters[name].detach())
            found[name] = Stack(weight, ExpertsAdapter.bias(module, name))
        return found

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        shell: Any = self.shell
        up, down = self._stack(0), self._stack(1)
        chosen = top_k_index.reshape(-1)
        order = chosen.argsort(stable=True)
        token = order.div(top_k_index.shape[-1], rounding_mode="floor")
        counts = torch.bincount(chosen, minlength=self.num_experts)[: self.num_experts].tolist()
        rows, begin = hidden_states[token], 0
        where: list[tuple[int, int, int]] = []
        for expert, count in enumerate(counts):
            if count:
                where.append((expert, begin, begin + count))
            begin += count
        y = torch.zeros_like(hidden_states)
        if not where:
            return y
        entered = torch.cat([up(rows[a:b], expert) for expert, a, b in where])
        inner = self._gated(shell, entered).to(hidden_states.dtype)
        left = torch.cat([down(inner[a:b], expert) for expert, a, b in where])
        token, order = token[: len(left)], order[: len(left)]  # what names no expert comes last
        left = left * top_k_weights.reshape(-1)[order].unsqueeze(1)
        return y.index_add_(0, token, left.to(y.dtype))

    def _stack(self, which: int) -> Stack | PackedStack:
        found: Any = next(self._modules[name] for name in PROJECTIONS[which] if name in self._modules)
        return found  # type: ignore[no-any-return]

    @staticmethod
    def _gated(shell: Any, x: Tensor) -> Tensor:
        if not getattr(shell, "has_gate", True):
            return shell.act_fn(x)  # type: ignore[no-any-return]
        apply = getattr(shell, "_apply_gate", None)
        if apply is not None:
            return apply(x)  # type: ignore[no-any-return]
        gate, up = x.chunk(2, dim=-1)
        return shell.act_fn(gate) * up  # type: ignore[no-any-return]

    def dense(self, weights: Mapping[str, tuple[Tensor, Tensor | None]]) -> nn.Module:
        module = shell_of(self.shell)
        for name, (weight, bias) in weights.items():
            own = (weight.transpose(1, 2) if self.transposed else weight).contiguous()
            module._parameters[name] = nn.Parameter(own, requires_grad=False)
            if bias is not None:
                module._parameters[f"{name}_bias"] = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
        return module
