"""The products of layers that can be taken apart, and which kernels serve a packed one."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from zeroskip import attention_layers, expert_layers, ops, recurrent_layers  # noqa: F401  # each registers its kind
from zeroskip.errors import ZeroskipError
from zeroskip.formats import Packed
from zeroskip.model import Site
from zeroskip.planning.candidates import pack_as
from zeroskip.planning.plan import SitePlan
from zeroskip.split_layers import PackedStack, Stack, split_of

__all__ = ["one_kernel", "packed_stack", "product_of", "serve"]


def product_of(site: Site) -> nn.Module | None:
    """Return the product that the site is of a layer that can be taken apart, None for any other layer."""
    kind = split_of(site.module)
    return None if kind is None else kind.products(site.module)[site.parameter]


def packed_stack(choice: SitePlan, site: Site, whole: Stack) -> PackedStack:
    """Pack every matrix of a site as the plan says; ZeroskipError where one does not fit."""
    packed, scales = [], site.scales
    for i, matrix in enumerate(site.weight()):
        own = None if scales is None else scales[i : i + 1]
        packed.append(pack_as(choice.format, matrix.contiguous(), choice.values, own))
        serve(packed[-1], choice)
    return PackedStack.of(packed, cast("Tensor | None", whole.bias))


def serve(packed: Packed, choice: SitePlan) -> None:
    """Fill the tuning table, or see that the one kernel of a pinned site can serve; the layer itself carries that."""
    if not choice.pinned:
        ops.tune(packed, choice.kernels)
    elif one_kernel(choice) not in ops.kernels(packed):
        raise ZeroskipError(f"there is no kernel {one_kernel(choice)!r} for it on this CPU")


def one_kernel(choice: SitePlan) -> str:
    """Return the kernel that serves every token count at a pinned site."""
    if len(choice.kernels) != 1:
        raise ZeroskipError(f"{choice.name} is batch-invariant with {len(choice.kernels)} kernels: compile it again")
    return choice.kernels[0][1]
