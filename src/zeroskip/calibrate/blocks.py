"""Which modules of a model are its blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from zeroskip.calibrate.replay import Block
from zeroskip.model import Site, every_site

__all__ = ["alone", "find_blocks", "sites_of"]


def find_blocks(model: nn.Module, sites: Sequence[Site] = ()) -> list[Block]:
    """Return the blocks of a model in module order; which are called, and when, a forward will tell.

    Every item of a maximal nn.ModuleList whose items are of one class (or have a base class in common that is more
    than nn.Module: the mixed layers of a hybrid model) is a block, if there is a site in the list. `sites` that lie in
    no list become blocks of their own.

    A model without such a list, as convolutional ones are, falls into the items of its nn.Sequentials, and the layers
    outside of them. So no more is in memory at a time than the statistics of one item (a residual block), and each is
    pruned on what the pruned ones before it give.
    """
    every = every_site(model)
    owners = {id(site.module) for site in every}

    def has_site(part: nn.Module) -> bool:
        return any(id(module) in owners for module in part.modules())

    lists = [(name, items) for name, items in _lists(model, "") if has_site(items)]
    blocks = [Block(f"{name}.{index}", item, name) for name, items in lists for index, item in enumerate(items)]
    if blocks:
        return blocks + alone(blocks, sites)
    items = {id(block.module): block for block in _items(model, "")}.values()
    blocks = [block for block in items if has_site(block.module)]
    order = {id(module): index for index, module in enumerate(model.modules())}
    found = sorted(blocks + alone(blocks, every), key=lambda block: order[id(block.module)])
    return found or [Block("", model, "")]


def alone(blocks: Sequence[Block], sites: Sequence[Site]) -> list[Block]:
    """Return a block for every module that owns one of the sites and lies in none of the blocks."""
    inside = {id(module) for block in blocks for module in block.module.modules()}
    owners = {site.owner: site.module for site in sites if id(site.module) not in inside}
    return [Block(name, module, name) for name, module in owners.items()]


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


def _items(module: nn.Module, name: str) -> Iterator[Block]:
    """The items of the nn.Sequentials in a module; those of an inner one in place of itself."""
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if type(module) is nn.Sequential and type(child) is not nn.Sequential:
            yield Block(path, child, name)
        else:
            yield from _items(child, path)


def _alike(items: nn.ModuleList) -> bool:
    kinds = [set(type(item).__mro__) for item in items]
    common = set.intersection(*kinds) - set(nn.Module.__mro__)
    return bool(common)
