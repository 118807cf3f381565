"""Our own packed directory, without measuring: each linear layer in the layout that takes the fewest bytes.

Which weights are of linear layers, and which way round they lie, only the architecture says: so the model is loaded,
from files that hold ordinary weights by then. What is fastest on a machine is `zeroskip.compile`'s to find out.
"""

from __future__ import annotations

from torch import nn

from zeroskip.convert.base import Format
from zeroskip.formats import names
from zeroskip.planning.candidates import NAMES, Layout, format_layout
from zeroskip.planning.install import put_in, weights_of
from zeroskip.planning.planner import plannable, recorded_kinds

__all__ = ["Zeroskip", "pack_smallest"]


class Zeroskip(Format):
    name = "zeroskip"
    reads = False  # its method in config.json says so, and compiled.py reads it
    writes = True
    packs = True


def pack_smallest(model: nn.Module) -> tuple[list[str], list[str]]:
    """Pack in place every linear layer that gets smaller; return their names, and notes on those that do not.

    Values are stored as they are: integers where scales say so, else the weight's own type.
    """
    sites, notes = plannable(model, None)
    packed: list[str] = []
    for site in sites:
        weight, bias = weights_of(site)
        kinds = recorded_kinds(site, weight) or (NAMES[weight.dtype],)
        made = [format_layout(name, weight, bias, kind, site.whole_scales) for kind in kinds for name in names()]
        layouts = [each for each in made if isinstance(each, Layout) and each.nbytes < weight.nbytes]
        if not layouts:
            notes.append(f"{site.name}: stays dense, no layout of ours is smaller")
            continue
        put_in(model, site.module, min(layouts, key=lambda each: each.nbytes).install().train(site.module.training))
        packed.append(site.name)
    return packed, notes
