"""Recurrent layers: the gates of a layer and direction are one matrix for its input and one for its hidden state.

What the hidden-state matrix multiplies is what the layer returned a step before, so each layer is run alone, on what
the layers below it return.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from zeroskip.sites.base import Adapter, Call, Inputs

__all__ = ["RecurrentAdapter", "alone", "directions"]

FORWARDS = (nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward)


class RecurrentAdapter(Adapter):
    """nn.LSTM, nn.GRU, nn.RNN: weight_ih_l*, weight_hh_l*, each [gates x hidden, in], weight_hr_l* of a projection.

    Any number of layers, one or two directions, batch first or not, unbatched, or a PackedSequence.
    """

    @staticmethod
    def matches(module: nn.Module) -> bool:
        if not isinstance(module, nn.RNNBase) or type(module).forward not in FORWARDS:
            return False
        return all(name in module._parameters for name in RecurrentAdapter.parameters(module))

    @staticmethod
    def parameters(module: nn.Module) -> tuple[str, ...]:
        return tuple(name for name in cast(nn.RNNBase, module)._flat_weights_names if name.startswith("weight_"))

    @staticmethod
    def bias(module: nn.Module, parameter: str) -> Tensor | None:
        bias = getattr(module, parameter.replace("weight", "bias"), None)
        return bias if isinstance(bias, Tensor) else None

    @staticmethod
    def inputs(module: nn.Module, call: Call, wanted: Sequence[str]) -> Iterator[tuple[str, Inputs]]:
        rnn = cast(nn.RNNBase, module)
        x, lengths, keep = _steps(rnn, call)
        states = _states(rnn, call.named(type(rnn).forward).get("hx"), x)
        for layer in range(rnn.num_layers):
            outputs = []
            for direction, suffix in enumerate(directions(rnn, layer)):
                own, seen = (_flipped(each, lengths) if direction else each for each in (x, keep))
                start = tuple(state[layer * len(directions(rnn, layer)) + direction] for state in states)
                output = alone(rnn, suffix, own, start)
                before = torch.cat([start[0].unsqueeze(0), output[:-1]])
                yield f"weight_ih{suffix}", own[seen].unsqueeze(0)
                yield f"weight_hh{suffix}", before[seen].unsqueeze(0)
                if rnn.proj_size:
                    yield f"weight_hr{suffix}", _unprojected(rnn, suffix, own, before, start[1])[seen].unsqueeze(0)
                outputs.append(_flipped(output, lengths) if direction else output)
            x = torch.cat(outputs, -1)


def directions(rnn: nn.RNNBase, layer: int) -> tuple[str, ...]:
    """Return how the names of this layer's weights end, one ending a direction."""
    return (f"_l{layer}", f"_l{layer}_reverse") if rnn.bidirectional else (f"_l{layer}",)


def _steps(rnn: nn.RNNBase, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return x [steps, batch, in]; [batch] how long each sequence is; bool [steps, batch], True where a step counts."""
    if isinstance(call.x, PackedSequence):
        x, lengths = pad_packed_sequence(call.x)
        return x, lengths, torch.arange(len(x)).unsqueeze(1) < lengths
    x = call.x.detach()
    seen = call.visible(x)
    keep = torch.ones(x.shape[:-1], dtype=torch.bool) if seen is None else seen.reshape(x.shape[:-1]).cpu()
    if x.dim() == 2:
        x, keep = x.unsqueeze(1), keep.unsqueeze(1)
    elif rnn.batch_first:
        x, keep = x.transpose(0, 1), keep.t()
    return x, torch.full((x.shape[1],), len(x)), keep


def _states(rnn: nn.RNNBase, given: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Return the first states, each [layers x directions, batch, size]: hidden, and for an LSTM cell."""
    count, hidden = rnn.num_layers * (2 if rnn.bidirectional else 1), rnn.proj_size or rnn.hidden_size
    if given is None:
        sizes = (hidden, rnn.hidden_size) if rnn.mode == "LSTM" else (hidden,)
        return tuple(x.new_zeros(count, x.shape[1], size) for size in sizes)
    states = given if isinstance(given, tuple) else (given,)
    return tuple(state if state.dim() == 3 else state.unsqueeze(1) for state in states)


def alone(rnn: nn.RNNBase, suffix: str, x: Tensor, start: tuple[Tensor, ...]) -> Tensor:
    """Return what one layer and direction of `rnn` gives for x [steps, batch, in]: [steps, batch, hidden]."""
    kinds: dict[str, Any] = {"LSTM": nn.LSTM, "GRU": nn.GRU}
    more: dict[str, Any] = {"proj_size": rnn.proj_size} if rnn.mode == "LSTM" else {}
    if rnn.mode not in kinds:
        more["nonlinearity"] = rnn.mode.removeprefix("RNN_").lower()
    twin = kinds.get(rnn.mode, nn.RNN)(x.shape[-1], rnn.hidden_size, bias=rnn.bias, device="meta", **more)
    for name in list(twin._flat_weights_names):
        setattr(twin, name, getattr(rnn, name.removesuffix("_l0") + suffix))
    states = tuple(state.unsqueeze(0) for state in start)
    with torch.no_grad():
        output: Tensor = twin(x, states if rnn.mode == "LSTM" else states[0])[0]
    return output


def _flipped(x: Tensor, lengths: Tensor) -> Tensor:
    """Turn each sequence of x [steps, batch, ...] round, its padding left where it is."""
    steps = torch.arange(len(x)).unsqueeze(1)
    order = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return x[order.to(x.device), torch.arange(x.shape[1], device=x.device)]


def _unprojected(rnn: nn.RNNBase, suffix: str, x: Tensor, before: Tensor, cell: Tensor) -> Tensor:
    """Return the hidden states of an LSTM before its projection, [steps, batch, hidden]."""
    own: dict[str, Any] = {
        part: getattr(rnn, part + suffix, None) for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }
    with torch.no_grad():
        gates = linear(x, own["weight_ih"], own["bias_ih"]) + linear(before, own["weight_hh"], own["bias_hh"])
        enter, forget, new, leave = gates.chunk(4, -1)
        hidden = []
        for step in range(len(x)):
            cell = forget[step].sigmoid() * cell + enter[step].sigmoid() * new[step].tanh()
            hidden.append(leave[step].sigmoid() * cell.tanh())
    return torch.stack(hidden)
