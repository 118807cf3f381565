"""A recurrent layer taken apart: each of its products is a layer of its own, which a plan may pack.

For each layer and direction the product with the input runs once over all time steps; that with the hidden state runs
step by step:

    LSTM  i f g o = W x_t + V h,  c <- sigma(f) c + sigma(i) tanh(g),  h <- sigma(o) tanh(c)
    GRU   r z = sigma(W x_t + V h),  n = tanh(W_n x_t + r V_n h),  h <- (1 - z) n + z h
    RNN   h <- tanh or relu (W x_t + V h)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from zeroskip.errors import ZeroskipError
from zeroskip.sites.recurrent import directions
from zeroskip.split_layers import Split

__all__ = ["SplitRecurrent", "obstacle", "products"]

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


def obstacle(rnn: nn.RNNBase) -> str | None:
    """Return why a recurrent layer cannot be taken apart, or None."""
    return "it projects its hidden state" if rnn.proj_size else None


def products(rnn: nn.RNNBase) -> dict[str, nn.Linear]:
    """Return the products of a recurrent layer by the names of their weights, which are shared, not copied."""
    found: dict[str, nn.Linear] = {}
    for layer in range(rnn.num_layers):
        for suffix in directions(rnn, layer):
            for part in ("ih", "hh"):
                weight: Tensor = getattr(rnn, f"weight_{part}{suffix}").detach()
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=rnn.bias, device="meta", dtype=weight.dtype)
                linear.weight = nn.Parameter(weight, requires_grad=False)
                if rnn.bias:
                    bias = getattr(rnn, f"bias_{part}{suffix}").detach()
                    linear.bias = nn.Parameter(bias, requires_grad=False)
                found[f"weight_{part}{suffix}"] = linear
    return found


class SplitRecurrent(Split):
    """nn.LSTM, nn.GRU or nn.RNN whose products are its children `weight_ih_l0`, `weight_hh_l0`, ...

    Takes and returns what the layer did: x [steps, batch, in] (batch first, or without a batch), first states or none.
    Inference only. A PackedSequence is refused.

    Parameters
    ----------
    rnn : nn.RNNBase
        Only its sizes are read.
    parts : mapping
        {name: module}, each x [..., in] -> [..., gates x hidden], bias included.
    """

    def __init__(self, rnn: nn.RNNBase, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(rnn, parts)
        self.mode, self.input_size, self.hidden_size = rnn.mode, rnn.input_size, rnn.hidden_size
        self.num_layers, self.bias, self.batch_first = rnn.num_layers, rnn.bias, rnn.batch_first
        self.bidirectional, self.dropout, self.proj_size = rnn.bidirectional, rnn.dropout, 0
        for name, part in parts.items():
            self.add_module(name, part)

    @staticmethod
    def takes(module: nn.Module) -> bool:
        return isinstance(module, nn.RNNBase)

    @staticmethod
    def obstacle(module: Any) -> str | None:
        return obstacle(module)

    @staticmethod
    def products(module: Any) -> dict[str, nn.Module]:
        return dict(products(module))

    def forward(self, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        if isinstance(x, PackedSequence):
            raise ZeroskipError("a compiled recurrent layer takes no PackedSequence: give padded sequences")
        if x.shape[-1] != self.input_size or x.dim() not in (2, 3):
            raise ZeroskipError(f"x is {list(x.shape)}: expected [steps, batch, {self.input_size}]")
        batched = x.dim() == 3
        x = x.unsqueeze(1) if not batched else x.transpose(0, 1) if self.batch_first else x
        ways = 2 if self.bidirectional else 1
        if hx is None:
            zeros = x.new_zeros(self.num_layers * ways, x.shape[1], self.hidden_size)
            states = (zeros, zeros)
        else:
            given = hx if self.mode == "LSTM" else (hx, hx)
            states = tuple(state if batched else state.unsqueeze(1) for state in given)
        ends: list[tuple[Tensor, Tensor]] = []
        for layer in range(self.num_layers):
            outputs = []
            for way, suffix in enumerate(directions(cast(nn.RNNBase, self), layer)):
                at = layer * ways + way
                output, end = self._run(suffix, x, states[0][at], states[1][at], backwards=bool(way))
                outputs.append(output)
                ends.append(end)
            x = torch.cat(outputs, -1) if ways > 1 else outputs[0]
        last = [torch.stack(each) for each in zip(*ends, strict=True)]
        if not batched:
            x, last = x.squeeze(1), [each.squeeze(1) for each in last]
        elif self.batch_first:
            x = x.transpose(0, 1)
        return x, tuple(last) if self.mode == "LSTM" else last[0]

    def _run(
        self, suffix: str, x: Tensor, hidden: Tensor, cell: Tensor, backwards: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        entering, repeat = self._modules[f"weight_ih{suffix}"], self._modules[f"weight_hh{suffix}"]
        assert entering is not None and repeat is not None
        steps = entering(x).unbind(0)
        outputs: list[Tensor] = []
        for now in reversed(steps) if backwards else steps:
            if self.mode == "LSTM":
                enter, forget, new, leave = (now + repeat(hidden)).chunk(4, -1)
                cell = torch.addcmul(forget.sigmoid() * cell, enter.sigmoid(), new.tanh())
                hidden = leave.sigmoid() * cell.tanh()
            elif self.mode == "GRU":
                a, b = now.split((2 * self.hidden_size, self.hidden_size), -1)
                c, d = repeat(hidden).split((2 * self.hidden_size, self.hidden_size), -1)
                reset, update = (a + c).sigmoid().chunk(2, -1)
                hidden = torch.lerp(torch.addcmul(b, reset, d).tanh(), hidden, update)
            else:
                total = now + repeat(hidden)
                hidden = total.relu() if self.mode == "RNN_RELU" else total.tanh()
            outputs.append(hidden)
        if backwards:
            outputs.reverse()
        return torch.stack(outputs) if outputs else x.new_zeros(0, x.shape[1], self.hidden_size), (hidden, cell)

    def dense(self, weights: Mapping[str, tuple[Tensor, Tensor | None]]) -> nn.RNNBase:
        """Return the recurrent layer of torch with these weights and biases, by the names of the products."""
        kinds: dict[str, Any] = {"LSTM": nn.LSTM, "GRU": nn.GRU}
        more = {} if self.mode in kinds else {"nonlinearity": self.mode.removeprefix("RNN_").lower()}
        rnn: nn.RNNBase = kinds.get(self.mode, nn.RNN)(
            self.input_size, self.hidden_size, self.num_layers, bias=self.bias, batch_first=self.batch_first,
            dropout=self.dropout, bidirectional=self.bidirectional, device="meta", **more,
        )  # fmt: skip
        for name, (weight, bias) in weights.items():
            setattr(rnn, name, nn.Parameter(weight, requires_grad=False))
            if bias is not None:
                setattr(rnn, name.replace("weight", "bias"), nn.Parameter(bias.to(weight.dtype), requires_grad=False))
        return rnn

    def extra_repr(self) -> str:
        return f"{self.mode}, {self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"
