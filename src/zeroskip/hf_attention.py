"""Attention of a decode step in transformers: one query a head, keys and values read where the cache holds them.

transformers calls attention by a name. Under the name "sdpa", the default, ours takes the place of its own function and
hands on whatever it does not do itself: every module outside a compiled model, several queries, gradients, masks
that are not boolean, dropout, positions added to the scores. So the name in a model's config stays, with all that
transformers decides by it, and `set_attn_implementation` with any other name leaves ours out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from zeroskip.decode_ops import attend, can_attend
from zeroskip.native import is_plain

__all__ = ["attach_attention", "attention", "detach_attention", "in_use"]

MARK = "zeroskip_attention"
UNUSUAL = ("cache", "position_bias", "softcap", "s_aux")  # arguments that change what is computed

_theirs: Callable[..., Any] | None = None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as transformers' "sdpa" does.

    Parameters
    ----------
    query, key, value : Tensor
        [batch, heads or key heads, tokens, head_dim].
    attention_mask : Tensor or None
    dropout, scaling, rest
        As transformers gives them.

    Returns
    -------
    (Tensor, None)
        [batch, tokens, heads, head_dim].
    """
    if (
        MARK in module.__dict__
        and query.shape[2] == 1
        and not dropout
        and not any(rest.get(name) is not None for name in UNUSUAL)
        and _ours(query, key, value)
        and can_attend(query, key, value, attention_mask)
    ):
        return attend(query, key, value, attention_mask, scaling), None
    theirs = _theirs or _register()
    found: tuple[Tensor, Tensor | None] = theirs(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
    )
    return found


def _ours(query: Tensor, key: Tensor, value: Tensor) -> bool:
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return False
    return torch.compiler.is_compiling() or (is_plain(query) and type(key) is type(value) is Tensor)


def in_use(module: Any) -> bool:
    """Return whether an attention module would call ours."""
    own = module.__dict__
    named = getattr(own.get("config"), "_attn_implementation", None)
    return MARK in own and named == "sdpa" and _functions()["sdpa"] is attention


@cache
def _functions() -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def _register() -> Callable[..., Any]:
    """Put ours in the place of transformers' own, once, and return that."""
    global _theirs
    from transformers import AttentionInterface

    held: Callable[..., Any] = _functions()["sdpa"]
    if _theirs is None or held is not attention:
        _theirs = held
        AttentionInterface.register("sdpa", attention)
    return _theirs


def attach_attention(model: nn.Module) -> None:
    """Let the attention modules of a transformers model use ours where they can."""
    _register()
    for module in model.modules():
        if "Attention" in type(module).__name__:
            module.__dict__[MARK] = True


def detach_attention(model: nn.Module) -> None:
    """Take that back."""
    for module in model.modules():
        module.__dict__.pop(MARK, None)
