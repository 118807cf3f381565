"""Everything that can run a site: torch's dense layers, and every kernel of every format that accepts the weight.

Formats come from the registry and kernels from the native table, so a new one is a candidate with no change here.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from zeroskip import ops
from zeroskip.bench.dense import rivals
from zeroskip.dense_layers import OneDnnLinear
from zeroskip.errors import ZeroskipError, suggest
from zeroskip.formats import Packed, get, names, pack, value_types
from zeroskip.formats.blob import check
from zeroskip.nn import PackedLinear
from zeroskip.quantize import LIMIT, fits_fp16, group_of

__all__ = [
    "DENSE_FORMATS",
    "PRECISIONS",
    "Layout",
    "allowed_values",
    "check_precision",
    "few_zeros",
    "format_layout",
    "kernels_to_try",
    "layouts",
    "pack_as",
]

log = logging.getLogger(__name__)

PRECISIONS = value_types()  # from wide to narrow; "down to" a precision is a prefix of this
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
DENSE_FORMATS = ("dense",)  # formats that store every weight; the others have to beat these
FEW_ZEROS = 0.02  # with fewer, every sparse layout stores more than the dense ones: not worth the time
Call = Callable[[Tensor], Tensor]


@dataclass
class Layout:
    """One way to store a site, with the kernels that can serve it.

    Attributes
    ----------
    label : str
        As the plan shows it: format (or rival) and values, ``'bitmask bf16'``.
    format, values : str
        The registered format, or the name of a dense rival of torch; the storage.
    kernels : tuple of str
        Kernels of a format, best guess first; ``('torch',)`` for a rival.
    dense : bool
        Whether it is one of the dense ones that a sparse layout has to beat.
    nbytes : int
        Bytes of the stored weight.
    copies : function (kernel, how many) -> calls
        Each call, x [tokens, k] -> y [tokens, m], works on a copy of the weight of its own.
    install : function () -> nn.Module
        The module that takes the site's place.
    packed : Packed or None
        The packed weight of a format.
    """

    label: str
    format: str
    values: str
    kernels: tuple[str, ...]
    dense: bool
    nbytes: int
    copies: Callable[[str, int], list[Call]]
    install: Callable[[], nn.Module]
    pattern: str | None = None
    packed: Packed | None = None
    notes: list[str] = field(default_factory=list)


def check_precision(precision: str | None) -> str | None:
    """Return `precision` if it can be asked for.

    Raises
    ------
    ZeroskipError
        For an unknown precision.
    """
    if precision is None or precision in PRECISIONS:
        return precision
    hint = suggest(str(precision), PRECISIONS)
    raise ZeroskipError(f"precision is {precision!r}: give {', '.join(PRECISIONS)}, or leave it out{hint}")


def allowed_values(dtype: torch.dtype, precision: str | None, recorded: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the storage that may compete for a weight of this dtype; empty if it has to stay as it is.

    With no precision, the model's own. Else everything from the model's own to the precision asked for, whichever of
    the two is wider; fp16 weights have no kernels of their own and need a precision.

    `recorded` are the integers that a solver has rounded the weight to (`quantize.kinds_of`). They lose nothing, so
    they compete with no precision as well, and where integers were asked for they are the only ones: no weight is
    rounded twice.
    """
    own = NAMES.get(dtype)
    if dtype == torch.float16 and precision is not None:
        own = "fp32"
    if own not in PRECISIONS:
        return recorded if dtype == torch.float16 else ()
    if precision is None:
        return (own, *recorded)
    first, last = sorted((PRECISIONS.index(own), PRECISIONS.index(precision)))
    both = PRECISIONS[first : last + 1]
    both = both if both[0] == own else (*both[::-1],)
    if recorded and precision in LIMIT:
        return (*(values for values in both if values not in LIMIT), *recorded)
    return both


def layouts(
    module: nn.Module, weight: Tensor, bias: Tensor | None, values: tuple[str, ...], tokens: int
) -> tuple[list[Layout], dict[str, str]]:
    """Return the layouts that can store `weight` [m, k], and why the others cannot.

    The layer as it stands always comes first, also where its dtype has no kernels (fp16). Where a solver has rounded
    the weight to integers, those of its kind are stored with its own scales, so that nothing is rounded twice.
    """
    own = NAMES.get(weight.dtype, str(weight.dtype))
    found = [_as_it_stands(module, weight, own)]
    refused: dict[str, str] = {}
    few = few_zeros(weight)
    for kind in values:
        for name, rival in rivals().items():
            if f"{name} {kind}" == found[0].label:
                continue
            problem = rival.problem(kind)
            if problem is not None:
                refused[f"{name} {kind}"] = problem
                continue
            found.append(_torch_layout(name, weight, bias, kind, tokens))
        for name in names():
            if few is not None and name not in DENSE_FORMATS:
                refused[f"{name} {kind}"] = few
                continue
            made = format_layout(name, weight, bias, kind, getattr(module, "zeroskip_scales", None))
            if isinstance(made, Layout):
                found.append(made)
            else:
                refused[f"{name} {kind}"] = made
    return found, refused


def few_zeros(weight: Tensor) -> str | None:
    """Return why no sparse layout is worth measuring, or None."""
    zeros = 1.0 - float(torch.count_nonzero(weight)) / weight.numel()
    return None if zeros >= FEW_ZEROS else f"the weight has too few zeros: {zeros:.1%}"


def _as_it_stands(module: nn.Module, weight: Tensor, own: str) -> Layout:
    def copies(kernel: str, count: int) -> list[Call]:
        return [copy.deepcopy(module) for _ in range(count)]

    nbytes = weight.numel() * weight.element_size()
    return Layout(f"linear {own}", "linear", own, ("torch",), True, nbytes, copies, lambda: module)


def _torch_layout(name: str, weight: Tensor, bias: Tensor | None, values: str, tokens: int) -> Layout:
    def install() -> nn.Module:
        return rivals()[name].build(weight, bias, values, tokens)

    def copies(kernel: str, count: int) -> list[Call]:
        return [install() for _ in range(count)]

    size = {"fp32": 4, "bf16": 2}[values]
    first = install()
    nbytes = first.nbytes if isinstance(first, OneDnnLinear) else weight.numel() * size
    return Layout(f"{name} {values}", name, values, ("torch",), True, nbytes, copies, install)


def format_layout(
    name: str, weight: Tensor, bias: Tensor | None, values: str, scales: Tensor | None = None
) -> Layout | str:
    """Pack `weight` [m, k] in a format and return its layout, or the reason why there is none, in one line."""
    reason = get(name).accepts(weight)
    if reason is not None:
        return reason
    try:
        packed = pack_as(name, weight, values, scales)
    except ValueError as error:
        return str(error)
    layout = packed_layout(packed, bias)
    return layout if layout.kernels else "no kernel for it on this CPU"


def pack_as(format: str, weight: Tensor, values: str, scales: Tensor | None) -> Packed:
    """Pack `weight` [m, k], with `scales` [1, m, groups] where it is integers of this kind times them.

    Other integers get fp32 scales where fp16 does not hold them.
    """
    group_size = None if scales is None else group_of(weight, scales[0], values)
    if scales is None or group_size is None:
        held = values not in LIMIT or fits_fp16(weight, values)
        return pack(weight, format=format, values=values, scales="fp16" if held else "fp32")
    return pack(weight, format=format, values=values, group_size=group_size, scales=scales[0])


def packed_layout(packed: Packed, bias: Tensor | None) -> Layout:
    """Return the layout of a weight that is packed already."""

    def copies(kernel: str, count: int) -> list[Call]:
        return [_Forced(packed.blob.clone(), bias, packed.shape[0], kernel) for _ in range(count)]

    return Layout(
        f"{packed.format} {packed.values}",
        packed.format,
        packed.values,
        kernels_to_try(packed),
        packed.format in DENSE_FORMATS,
        packed.nbytes,
        copies,
        lambda: PackedLinear.from_packed(packed, bias, None),
        packed.pattern,
        packed,
    )


_call_by = torch.ops.zeroskip.linear_by.default  # nothing here wants a gradient: `ops.call_by` would look


# The product's route is module, dispatcher, op. A candidate pays for the same steps: without them it would look a few
# microseconds better than it is, which decides small layers at one token.
class _Forced(nn.Module):
    """`PackedLinear` with one kernel forced."""

    def __init__(self, blob: Tensor, bias: Tensor | None, m: int, kernel: str) -> None:
        super().__init__()
        check(blob)  # now: the first call would, and of many copies most are called once or twice
        self.weight = nn.Parameter(blob, requires_grad=False)
        kept = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", kept)
        self.m, self.kernel = m, kernel

    def forward(self, x: Tensor) -> Tensor:
        own = self._parameters
        y: Tensor = _call_by(x, own["weight"], own["bias"], self.m, 0, self.kernel)
        return y


def kernels_to_try(packed: Packed) -> tuple[str, ...]:
    """Return the kernels worth measuring: all that can serve the blob, the scalar row only if nothing else can."""
    every = tuple(ops.kernels(packed))
    quick = tuple(name for name in every if not name.endswith("_scalar"))
    return quick or every


def copies_for(found: list[Layout], working_set_bytes: int) -> Iterator[tuple[Layout, str, list[Call]]]:
    """Yield (layout, kernel, calls) such that between two uses of one copy `working_set_bytes` are touched.

    Every kernel gets copies of its own: a second kernel on the same copy would find it in the cache.
    """
    a_round = sum(layout.nbytes * len(layout.kernels) for layout in found)
    count = max(1, math.ceil(working_set_bytes / max(a_round, 1)))
    for layout in found:
        for kernel in layout.kernels:
            yield layout, kernel, layout.copies(kernel, count)
