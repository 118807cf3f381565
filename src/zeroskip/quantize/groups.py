"""Group-wise symmetric integers: ``weight = code * scale``, one scale for each row and group of inputs.

Zero is the code 0, so zeros stay exactly zero. Where scales are computed here, codes run from -LIMIT to LIMIT; a
solver that brings its own scales may use the one code more that the type has on the negative side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor
from torch.nn.functional import pad

from zeroskip.errors import ZeroskipError, suggest

__all__ = [
    "BITS",
    "GROUPS",
    "LEAST",
    "LIMIT",
    "SCALES",
    "Quantized",
    "absmax_scales",
    "check_scales",
    "codes_of",
    "fits_fp16",
    "group_of",
    "kinds_of",
    "quantize",
]

BITS = {"int8": 8, "int4": 4}
LIMIT = {"int8": 127, "int4": 7}  # the largest code
LEAST = {"int8": -128, "int4": -8}  # the smallest code that can be stored
GROUPS = (32, 64, 128)  # inputs that share a scale; the last group of a row may be shorter
SCALES = {"fp16": torch.float16, "fp32": torch.float32}
LEAST_FP16 = 2.0**-17  # below, fp16 rounds a scale by more than 1/256, half a step of the largest code of int8
PASS = 1 << 17  # weights that are looked at together


@dataclass(frozen=True)
class Quantized:
    """A weight [m, k] as integers.

    Attributes
    ----------
    codes
        int8 [m, k], within [LEAST, LIMIT] of `values`.
    scales
        fp16 or fp32 [m, ceil(k / group_size)], finite and positive.
    values
        ``"int8"`` or ``"int4"``.
    group_size
        Inputs that share a scale, a member of `GROUPS`.
    """

    codes: Tensor
    scales: Tensor
    values: str
    group_size: int

    def dequantize(self) -> Tensor:
        """Return the weight, fp32 [m, k]; with fp16 scales every product is exact."""
        return self.codes.float() * _spread(self.scales, self.group_size, self.codes.shape[1])


def quantize(weight: Tensor, values: str, group_size: int | None = None, scales: str | Tensor = "fp16") -> Quantized:
    """Round a weight to integers, to the nearest code.

    Parameters
    ----------
    weight
        [m, k], floating point, finite; not modified.
    values
        ``"int8"`` or ``"int4"``.
    group_size
        A member of `GROUPS`; None means 64.
    scales
        ``"fp16"`` or ``"fp32"``: computed here, the largest weight of a group over LIMIT. Or a tensor
        [m, ceil(k / group_size)], fp16, fp32 or bf16, which is used exactly: a weight that is ``code * scale`` gets
        that code, and one beyond the codes the last.

    Raises
    ------
    ZeroskipError
        Another group size; scales of a wrong shape or type, not positive, not finite, too large or too small for fp16;
        or a weight more than twice as large as the codes of its given scale reach.
    """
    if values not in LIMIT:
        raise ZeroskipError(f"unknown integer type {values!r}{suggest(values, LIMIT)}")
    group_size = 64 if group_size is None else group_size
    if not isinstance(group_size, Integral) or group_size not in GROUPS:
        raise ZeroskipError(f"group_size is {group_size!r}: one scale serves 32, 64 or 128 inputs")
    if isinstance(scales, Tensor):
        scales = check_scales(scales, weight.shape[0], -(-weight.shape[1] // group_size), group_size)
        _check_reach(weight, scales, values, group_size)
    elif isinstance(scales, str) and scales in SCALES:
        scales = absmax_scales(weight, values, group_size, SCALES[scales])
    else:
        raise ZeroskipError(f"scales is {scales!r}: give a tensor or one of 'fp16', 'fp32'")
    return Quantized(codes_of(weight, scales, values, group_size), scales, values, group_size)


def absmax_scales(weight: Tensor, values: str, group_size: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Return scales [m, ceil(k / group_size)] under which the largest weight of each group is the code LIMIT.

    A group of zeros gets 1. A scale that its type rounds so far down that the largest weight would lie half a step
    beyond LIMIT (only subnormal scales are that coarse) is rounded up instead. A matrix all of whose scales fp16 would
    round so is refused; in others such groups are too small to matter.
    """
    limit, largest = LIMIT[values], _largest(weight, group_size)
    if dtype == torch.float16 and not fits_fp16(weight, values):
        most = float(largest.max())
        kind = "large" if most > 1 else "small"
        raise ZeroskipError(f"the largest weight is {most:.3g}, too {kind} for fp16 scales: use scales='fp32'")
    scales = (largest / limit).to(dtype)
    short = largest >= scales.float() * (limit + 0.5)
    bits = scales.view(torch.int16 if dtype == torch.float16 else torch.int32)
    scales = torch.where(short, bits + 1, bits).view(dtype)
    return torch.where(largest > 0, scales, torch.ones_like(scales))


def fits_fp16(weight: Tensor, values: str) -> bool:
    """Return whether fp16 holds the scales of `absmax_scales`: none too large, and the largest not too small."""
    most = weight.abs().max().float() / LIMIT[values] if weight.numel() else torch.zeros(())
    return bool(torch.isfinite(most.half())) and not 0 < float(most) < LEAST_FP16


def _largest(weight: Tensor, group_size: int) -> Tensor:
    """[m, k] -> fp32 [m, ceil(k / group_size)], the largest magnitude of each group."""
    m, k = weight.shape
    return pad(weight.abs().float(), (0, -k % group_size)).view(m, -1, group_size).amax(2)


def check_scales(scales: Tensor, m: int, groups: int, group_size: int) -> Tensor:
    """Return given scales as they are stored: fp16 or fp32, contiguous (bf16 becomes fp32, which holds it exactly)."""
    if scales.dtype == torch.bfloat16:
        scales = scales.float()
    if scales.dtype not in SCALES.values():
        raise ZeroskipError(f"scales are {scales.dtype}: give fp16, fp32 or bf16")
    if scales.shape != (m, groups):
        raise ZeroskipError(
            f"scales have shape {list(scales.shape)}, expected [{m}, {groups}]: rows, and groups of {group_size} inputs"
        )
    if not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise ZeroskipError("a scale is zero, negative or not finite: give a group of zeros any positive scale")
    return scales.detach().contiguous()


def _check_reach(weight: Tensor, scales: Tensor, values: str, group_size: int) -> None:
    """Raise where a weight is more than twice as large as the codes of its scale reach: clipping is not so hard."""
    steps = weight.float() / _spread(scales, group_size, weight.shape[1])
    beyond = (steps < 2 * LEAST[values]) | (steps > 2 * LIMIT[values])
    if bool(beyond.any()):
        row, column = (int(at) for at in beyond.nonzero()[0])
        group = column // group_size
        raise ZeroskipError(
            f"row {row}, group {group}: weight {float(weight[row, column]):.3g} lies beyond the {values} codes of its "
            f"scale {float(scales[row, group]):.3g}: give a larger scale"
        )


def codes_of(weight: Tensor, scales: Tensor, values: str, group_size: int) -> Tensor:
    """Return the codes nearest to ``weight / scale``, int8 [m, k]; halves go to the even code."""
    steps = weight.float() / _spread(scales, group_size, weight.shape[1])
    return steps.round_().clamp_(LEAST[values], LIMIT[values]).to(torch.int8)


def _spread(scales: Tensor, group_size: int, k: int) -> Tensor:
    return scales.float().repeat_interleave(group_size, dim=1)[:, :k]


def group_of(weight: Tensor, scales: Tensor, values: str) -> int | None:
    """Return the group size under which `weight` [m, k] is codes of `values` times `scales` [m, groups], or None.

    What a model keeps of such a weight in bf16 counts too: it is off by its own rounding, which changes no code.
    """
    size = _size_of(weight, scales)
    if size is None or values not in LIMIT:
        return None
    least, most = _code_range(weight, scales, size)
    return size if LEAST[values] <= least and most <= LIMIT[values] else None


def kinds_of(weight: Tensor, scales: Tensor) -> tuple[str, ...]:
    """Return the integer types, from wide to narrow, that hold `weight` [m, k] as codes times `scales` [m, groups].

    Codes of 4 bits are codes of 8 bits too. Empty where the scales are not those of this weight, because it was trained
    on, say.
    """
    size = _size_of(weight, scales)
    if size is None:
        return ()
    least, most = _code_range(weight, scales, size)
    return tuple(values for values in LIMIT if LEAST[values] <= least and most <= LIMIT[values])


def _size_of(weight: Tensor, scales: Tensor) -> int | None:
    fits = [size for size in GROUPS if scales.shape == (weight.shape[0], -(-weight.shape[1] // size))]
    return fits[0] if fits else None


def _code_range(weight: Tensor, scales: Tensor, size: int) -> tuple[float, float]:
    """Return the least and the largest code; infinities where the weight is no codes times these scales.

    A few rows at a time, which stay in the cache: ten passes over a whole weight take five times as long.
    """
    least, most = math.inf, -math.inf
    few = max(1, PASS // max(weight.shape[1], 1))
    for rows, their_scales in zip(torch.split(weight, few), torch.split(scales, few), strict=True):
        part, spread = rows.float(), _spread(their_scales, size, weight.shape[1])
        codes = (part / spread).round()
        if not bool(((part - codes * spread).abs() <= part.abs() / 256).all()):
            return -math.inf, math.inf
        low, high = codes.aminmax()
        least, most = min(least, float(low)), max(most, float(high))
    return least, most
