"""zeroskip: sparse deep-learning inference that is never slower than dense."""

# ruff: noqa: I001, E402
import torch as _torch  # first: the extension then shares torch's OpenMP runtime

from zeroskip.isa import isa, limit_to_environment as _limit_to_environment

_limit_to_environment()

from zeroskip.errors import ZeroskipError
from zeroskip.formats import Packed, names as formats, pack, unpack
from zeroskip.ops import linear

__version__ = "0.1.0"
__all__ = ["Packed", "ZeroskipError", "formats", "isa", "linear", "pack", "unpack"]

del _torch
