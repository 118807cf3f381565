"""Whether an output may have a time: the oracle, for our layouts and for peers that round more than we do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from zeroskip.bench.oracle import EPS32, TINY, UNIT, Oracle
from zeroskip.bench.peers.base import Mode
from zeroskip.dense_layers import DTYPES
from zeroskip.formats import unpack
from zeroskip.planning.candidates import Call, Layout

__all__ = ["Checker", "Stored", "stored"]

STEP = 1.05 / 254  # half a step of int8, relative to the largest of its group, and what the scale's rounding adds
SCALES = 2.0**-10  # activations and weights whose scales are fp16


@dataclass(frozen=True)
class Stored:
    """What a layout stores: the fp32 weight [m, k] that it stands for, and how it computes with it."""

    weight: Tensor
    mode: Mode


def stored(layout: Layout, weight: Tensor) -> Stored:
    """Return what a layout of ours or of torch stores: the given weight, or what integer codes make of it."""
    packed = layout.packed
    if packed is None or packed.group_size is None:
        return Stored(weight, Mode(layout.values, 32, layout.values))
    return Stored(unpack(packed).float(), Mode(layout.values, 8, activation_group=packed.group_size))


class Checker:
    """The oracle of one case; right answers are computed once for each stored weight and token count."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[Tensor, Oracle]] = {}

    def ours(self, call: Call, x: Tensor, what: Stored) -> str | None:
        """Return None if the layout's output for x [tokens, k] is right, else what is wrong with it."""
        try:
            y = call(x)
        except RuntimeError as error:
            return f"failed: {str(error).splitlines()[0]}"
        if what.mode.activation_group is not None:
            return self.theirs(y, x, what.weight, what.mode)
        return self._oracle(what.weight, x).problem(y, what.mode.values)

    def theirs(self, y: Tensor, x: Tensor, stands: Tensor, mode: Mode) -> str | None:
        """As `ours`, for the y [tokens, m] of a peer or of integer weights.

        Where activations are rounded to int8, the bound grows by half a step of each group's scale: the sum over
        inputs of |w| times the largest |x| of the group / 254, and by 2^-10 |W| |x| for scales in fp16.
        """
        oracle = self._oracle(stands, x)
        if y.shape != (x.shape[0], stands.shape[0]) or y.dtype != torch.float32:
            return f"gave {y.dtype} {tuple(y.shape)}, expected fp32 {(x.shape[0], stands.shape[0])}"
        if not bool(torch.isfinite(y).all()):
            return "gave NaN or Inf"
        relative = oracle.terms * EPS32 + (0.0 if mode.values == "fp32" else 2 * UNIT[DTYPES[mode.values]])
        bound = relative * oracle.magnitude + UNIT[torch.float32] * oracle.y.abs() + TINY
        if mode.activation_group is not None:
            coarse = _largest_of_group(x[oracle.rows], mode.activation_group)
            bound += SCALES * oracle.magnitude + STEP * (coarse @ stands.abs().t()).double()
        excess = float(((y[oracle.rows].double() - oracle.y).abs() / bound).max())
        return None if excess <= 1.0 else f"is off by {excess:.3g} times the bound"

    def _oracle(self, stands: Tensor, x: Tensor) -> Oracle:
        key = (stands.data_ptr(), x.shape[0])
        if key not in self._known:
            self._known[key] = (stands, Oracle(stands, None, x))  # holding it keeps the address from being used again
        return self._known[key][1]


def _largest_of_group(x: Tensor, group: int) -> Tensor:
    """Replace each activation [tokens, k] by the largest magnitude of its group of inputs."""
    tokens, k = x.shape
    grouped = pad(x, (0, -k % group)).view(tokens, -1, group)
    return grouped.abs().amax(-1, keepdim=True).expand_as(grouped).reshape(tokens, -1)[:, :k]
