"""Integers for weights: codes and the scales that turn them back. Pure functions; formats and pruning share them."""

from zeroskip.quantize.groups import (
    BITS,
    GROUPS,
    LEAST,
    LIMIT,
    SCALES,
    Quantized,
    absmax_scales,
    check_scales,
    codes_of,
    fits_fp16,
    group_of,
    kinds_of,
    quantize,
)

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
