"""Sites: the weights that can be pruned and packed. The order here is the order in which kinds of modules are tried."""

from zeroskip.sites.linear import Conv1DAdapter, LinearAdapter  # isort: skip
from zeroskip.sites.conv import ConvAdapter, DepthwiseAdapter  # isort: skip
from zeroskip.sites.attention import AttentionAdapter
from zeroskip.sites.base import Adapter, Call, Inputs, Site, adapter_of, sites_in
from zeroskip.sites.embedding import EmbeddingAdapter
from zeroskip.sites.experts import ExpertsAdapter
from zeroskip.sites.recurrent import RecurrentAdapter

__all__ = [
    "Adapter",
    "AttentionAdapter",
    "Call",
    "Conv1DAdapter",
    "ConvAdapter",
    "DepthwiseAdapter",
    "EmbeddingAdapter",
    "ExpertsAdapter",
    "Inputs",
    "LinearAdapter",
    "RecurrentAdapter",
    "Site",
    "adapter_of",
    "sites_in",
]
