"""Layouts of a weight. A new format: one file here, one import line below, one folder in csrc/kernels."""

from zeroskip.formats import bitmask as bitmask
from zeroskip.formats import csr as csr
from zeroskip.formats import dense as dense
from zeroskip.formats import strip_nm as strip_nm
from zeroskip.formats.base import Format, Packed, get, names, pack, unpack, value_types

__all__ = ["Format", "Packed", "get", "names", "pack", "unpack", "value_types"]
