"""Permutation of channels that leaves a model's function alone and makes room for a pattern's zeros."""

from zeroskip.permute.block import Permuter
from zeroskip.permute.find import Ends, Exchange, find_exchanges
from zeroskip.permute.probe import Probe
from zeroskip.permute.search import search

__all__ = ["Ends", "Exchange", "Permuter", "Probe", "find_exchanges", "search"]
