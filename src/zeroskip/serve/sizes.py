"""How much room the keys and values of all requests get."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from zeroskip.errors import ZeroskipError
from zeroskip.serve.settings import Settings

__all__ = ["Sizes"]

PAGE = 32  # tokens
CHUNK = 256  # tokens of prompts in one step: more would let those who decode wait
TAKEN = 0.8  # of the pages, that a request may have: the scheduler keeps a sixth free while it takes in prompts
SHARE = 0.25  # of the free memory, where nothing else was asked for


@dataclass(frozen=True)
class Sizes:
    """Sizes of the paged cache.

    Attributes
    ----------
    context : int
        Most tokens of one request, prompt and answer.
    page, pages : int
        Tokens in a page, and pages of the cache; a page holds these tokens' keys and values of all layers.
    batch_tokens : int
        Most tokens in one step.
    """

    context: int
    page: int
    pages: int
    batch_tokens: int

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype, settings: Settings) -> Sizes:
        """Return room for `max_concurrency` requests of the longest context, as far as the memory goes.

        Raises
        ------
        ZeroskipError
            If not even one request of a useful length fits.
        """
        own = int(getattr(config, "max_position_embeddings", None) or 2048)
        if settings.max_context is not None and settings.max_context > own:
            raise ZeroskipError(f"max_context is {settings.max_context}: the model knows {own} positions")
        context = settings.max_context or own
        each = bytes_a_token(config, dtype)
        asked = settings.cache_mb is not None
        room = (settings.cache_mb or 0) << 20 if asked else int(SHARE * psutil.virtual_memory().available)
        fit = room // (each * PAGE)
        # One page more a request: prompts that share a beginning hold on to it.
        wanted = max(settings.max_concurrency * (math.ceil(context / PAGE) + 1), math.ceil(context / (PAGE * TAKEN)))
        pages = min(fit, wanted)
        holds = int(pages * PAGE * TAKEN)
        if settings.max_context is not None and holds < context:
            need = math.ceil(context / (PAGE * TAKEN)) * PAGE * each / 2**20
            raise ZeroskipError(
                f"max_context is {context}, and a cache of {room >> 20} MB holds {holds} tokens of one request: "
                f"give --cache-mb {math.ceil(need)} or more, or a shorter context"
            )
        context = min(context, holds)
        if context < min(own, PAGE):
            need = math.ceil(2 * PAGE * each / 2**20)
            raise ZeroskipError(
                f"the cache has {room >> 20} MB, too few for one request: give --cache-mb {need} or more"
            )
        return cls(context, PAGE, pages, max(CHUNK, settings.max_concurrency))


def bytes_a_token(config: Any, dtype: torch.dtype) -> int:
    """Return the bytes of keys and values that one token has in all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * dtype.itemsize)
