"""Formats of other tools, in and out: one format, one file. The order is that in which layers of them are undone."""

from zeroskip.convert.sparse_bitmask import SparseBitmask  # isort: skip
from zeroskip.convert.sparse_24_bitmask import Sparse24Bitmask  # isort: skip
from zeroskip.convert.marlin_24 import Marlin24  # isort: skip
from zeroskip.convert.pack_quantized import PackQuantized  # isort: skip
from zeroskip.convert.naive_quantized import NaiveQuantized  # isort: skip
from zeroskip.convert.torch_ao import TorchAo  # isort: skip
from zeroskip.convert.torch_prune import TorchPrune  # isort: skip
from zeroskip.convert.asp import Asp  # isort: skip
from zeroskip.convert.modelopt import ModelOpt  # isort: skip
from zeroskip.convert.maskllm import MaskLLM  # isort: skip
from zeroskip.convert.dense import Dense  # isort: skip
from zeroskip.convert.zeroskip import Zeroskip  # isort: skip
from zeroskip.convert.base import Format, readable, writable
from zeroskip.convert.run import Conversion, convert

__all__ = [
    "Asp",
    "Conversion",
    "Dense",
    "Format",
    "Marlin24",
    "MaskLLM",
    "ModelOpt",
    "NaiveQuantized",
    "PackQuantized",
    "Sparse24Bitmask",
    "SparseBitmask",
    "TorchAo",
    "TorchPrune",
    "Zeroskip",
    "convert",
    "readable",
    "writable",
]
