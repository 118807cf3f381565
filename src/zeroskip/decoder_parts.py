"""The parts of a decoder layer that a step needs, found by their names; and whether anybody has put a hand on them.

The names are those that most language models of transformers share. A layer with parts of other names, or with more
parts than these, has none to find: it is computed by its own forward. That the parts also do what their names say is
found out by trying (hf_layers.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from zeroskip.nn import PackedLinear
from zeroskip.norm_layers import CONSTANTS
from zeroskip.planning.folding import Done

__all__ = ["ACTIVATION", "ATTENTION", "PRODUCTS", "Parts", "parts_of"]

watched: Any = torch_module._has_any_global_hook  # by hooks on every module of the process

ATTENTION, MLP = "self_attn", "mlp"
PRODUCTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
ACTIVATION = "mlp.act_fn"
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
ORDERS = (  # norms before attention, after it, before the MLP, after it
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
)


@dataclass(frozen=True)
class Parts:
    """The parts of one layer.

    Attributes
    ----------
    attention : nn.Module
    products : tuple of PackedLinear
        Queries, keys, values, output; gate, with its activation, up, down.
    all_norms : tuple of nn.Module or None
        Before attention, after it, before the MLP, after it, of queries, of keys.
    norm_names : tuple of str or None
        Of those in `all_norms`.
    places : tuple of (dict, name, module)
        Where each part was found.
    """

    attention: Any
    products: tuple[PackedLinear, ...]
    all_norms: tuple[nn.Module | None, ...]
    norm_names: tuple[str | None, ...]
    places: tuple[tuple[dict[str, nn.Module | None], str, nn.Module], ...]

    def in_place(self) -> bool:
        """Return whether every part is still where it was found."""
        return all(owner.get(name) is module for owner, name, module in self.places)

    def untouched(self) -> bool:
        """Return whether a call of each part would do what its class does, and nothing more."""
        if watched():
            return False
        for owner, name, module in self.places:
            own = module.__dict__
            if owner.get(name) is not module or "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
                return False
            if own["_backward_hooks"] or own["_backward_pre_hooks"]:
                return False
        return True


def parts_of(layer: nn.Module) -> Parts | None:
    """Return the parts of a layer; None where it has others, or they are not what a step can compute."""
    found = {name: module for name, module in layer.named_modules() if name}
    leaves = {name for name, module in found.items() if not module._modules}
    head_norms = HEAD_NORMS if HEAD_NORMS[0] in leaves else ()
    known = {*PRODUCTS, ACTIVATION, *head_norms}
    order = next((each for each in ORDERS if {*filter(None, each)} == leaves - known), None)
    if order is None or not known <= leaves or found.keys() - leaves != {ATTENTION, MLP}:
        return None
    products = tuple(found[name] for name in PRODUCTS)
    names = (*order, *(head_norms or (None, None)))
    norms = tuple(None if name is None else found[name] for name in names)
    packed = tuple(module for module in products if type(module) is PackedLinear)
    if len(packed) < len(products) or any(CONSTANTS not in norm.__dict__ for norm in norms if norm is not None):
        return None
    if not isinstance(found[ACTIVATION], Done) or packed[4].then is not found[ACTIVATION]:
        return None
    places = []
    for name, module in found.items():
        owner, _, leaf = name.rpartition(".")
        places.append((layer.get_submodule(owner)._modules, leaf, module))
    return Parts(found[ATTENTION], packed, norms, names, tuple(places))
