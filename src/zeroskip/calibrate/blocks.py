"""Which modules of a model are its blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from zeroskip.calibrate.replay import Block
from zeroskip.model import Site

__all__ = ["find_blocks", "sites_of"]


def find_blocks(model: nn.Module, sites: Sequence[Site] = ()) -> list[Block]:
    """Return the blocks of a model in module order; which are called, and when, a forward will tell.

    Every item of a maximal nn.ModuleList whose items are of one class (or have a base class in common that is more
    than nn.Module: the mixed layers of a hybrid model) is a block. A model without such a list is one block. `sites`
    that lie in no list become blocks of their own.
    """
    blocks = [
        Block(f"{name}.{index}", item, name) for name, items in _lists(model, "") for index, item in enumerate(items)
    ]
    if not blocks:
        return [Block("", model, "")]
    inside = {id(module) for block in blocks for module in block.module.modules()}
    return blocks + [Block(site.name, site.module, site.name) for site in sites if id(site.module) not in inside]


def sites_of(block: Block, sites: Sequence[Site]) -> list[Site]:
    """Return the sites that lie in a block, in module order."""
    inside = {id(module) for module in block.module.modules()}
    return [site for site in sites if id(site.module) in inside]


def _lists(module: nn.Module, name: str) -> list[tuple[str, nn.ModuleList]]:
    if isinstance(module, nn.ModuleList) and len(module) and _alike(module):
        return [(name, module)]
    return [
        found
        for child_name, child in module.named_children()
        for found in _lists(child, f"{name}.{child_name}" if name else child_name)
    ]


def _alike(items: nn.ModuleList) -> bool:
    kinds = [set(type(item).__mro__) for item in items]
    common = set.intersection(*kinds) - set(nn.Module.__mro__)
    return bool(common)
