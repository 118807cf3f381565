"""The sites of a model: the weights that can be pruned and packed, each seen as a stack of matrices.

One adapter class per kind of module; a new kind is one more subclass of `Adapter`.
"""

from __future__ import annotations

import fnmatch
import logging
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from zeroskip.errors import ZeroskipError, expect, suggest

__all__ = ["Adapter", "Site", "find_sites", "fits", "replace", "select_sites", "site_patterns", "unwrapped"]

log = logging.getLogger(__name__)


class Adapter:
    """How one kind of module is seen as matrices [groups, out, in], with y = x @ W^T in each group."""

    kinds: ClassVar[list[type[Adapter]]] = []

    def __init_subclass__(cls) -> None:
        Adapter.kinds.append(cls)

    @staticmethod
    def matches(module: nn.Module) -> bool:
        raise NotImplementedError

    @staticmethod
    def weight(module: nn.Module) -> Tensor:
        """Return the weight as [groups, out, in], a view of the parameter where the layout allows it."""
        raise NotImplementedError

    @staticmethod
    def write(module: nn.Module, weight: Tensor) -> None:
        """Copy [groups, out, in] into the parameter, in place."""
        raise NotImplementedError

    @staticmethod
    def inputs(module: nn.Module, x: Tensor) -> Tensor:
        """Return what the matrices multiply, [groups, tokens, in], from the module's first argument [..., in].

        The tokens of group 0 are the leading dimensions of `x`, flattened in order.
        """
        raise NotImplementedError


class LinearAdapter(Adapter):
    """nn.Linear: the weight is [out, in] as it stands."""

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and module.weight.dim() == 2 and module.weight.is_floating_point()

    @staticmethod
    def weight(module: nn.Module) -> Tensor:
        return _parameter(module).unsqueeze(0)

    @staticmethod
    def write(module: nn.Module, weight: Tensor) -> None:
        _parameter(module).copy_(weight[0])

    @staticmethod
    def inputs(module: nn.Module, x: Tensor) -> Tensor:
        return x.reshape(1, -1, x.shape[-1])


class Conv1DAdapter(LinearAdapter):
    """Conv1D of transformers (GPT-2 and its kin): a linear layer stored as [in, out]."""

    @staticmethod
    def matches(module: nn.Module) -> bool:
        # By name, so that transformers need not be imported.
        kind = type(module)
        return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")

    @staticmethod
    def weight(module: nn.Module) -> Tensor:
        return _parameter(module).t().unsqueeze(0)

    @staticmethod
    def write(module: nn.Module, weight: Tensor) -> None:
        _parameter(module).copy_(weight[0].t())


def _parameter(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight).detach()


@dataclass(frozen=True, eq=False)
class Site:
    """One prunable weight of a model.

    Attributes
    ----------
    name : str
        Dotted path of the module in the model.
    module : nn.Module
        The module that owns the weight.
    """

    name: str
    module: nn.Module

    @property
    def adapter(self) -> type[Adapter]:
        kind = _adapter(self.module)
        if kind is None:
            raise ZeroskipError(f"{self.name}: a {type(self.module).__name__} is not a site")
        return kind

    @property
    def shape(self) -> tuple[int, int, int]:
        """(groups, out, in) of the matrix view."""
        groups, rows, columns = self.weight().shape
        return groups, rows, columns

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    @property
    def scales(self) -> Tensor | None:
        """[groups, out, ceil(in / group)] where a solver has rounded the weight to integers times these, or None.

        They are kept on the module, as `zeroskip_scales`, and no cast of the model touches them.
        """
        scales = getattr(self.module, "zeroskip_scales", None)
        return scales if isinstance(scales, Tensor) else None

    def keep_scales(self, scales: Tensor | None) -> None:
        """Set or, with None, forget the scales of a weight that was just written."""
        self.module.__dict__.pop("zeroskip_scales", None)
        if scales is not None:
            self.module.__dict__["zeroskip_scales"] = scales

    def weight(self) -> Tensor:
        """Return the weight [groups, out, in] in the model's dtype, a view where possible; do not write to it."""
        return self.adapter.weight(self.module)

    def write(self, weight: Tensor) -> None:
        """Write [groups, out, in] into the parameter in place, in the parameter's dtype; zeros become +0.0.

        Raises
        ------
        ZeroskipError
            If a value does not fit the model's dtype; the parameter is then as it was.
        """
        old = self.weight()
        new = weight.to(old.dtype) + 0.0  # -0.0 + 0.0 is +0.0: sparse kernels elsewhere read -0.0 as a value
        if not bool(torch.isfinite(new).all()):
            raise ZeroskipError(
                f"{self.name}: a new weight overflows {old.dtype}; load the model in float32 or bfloat16"
            )
        with torch.no_grad():
            self.adapter.write(self.module, new)

    def inputs(self, x: Tensor) -> Tensor:
        """Return the module's first argument as [groups, tokens, in]."""
        return self.adapter.inputs(self.module, x)


def _adapter(module: nn.Module) -> type[Adapter] | None:
    return next((kind for kind in reversed(Adapter.kinds) if kind.matches(module)), None)


def find_sites(
    model: nn.Module, include: str | Iterable[str] | None = None, exclude: str | Iterable[str] | None = ("lm_head",)
) -> list[Site]:
    """Return the sites of `model` in module order.

    Parameters
    ----------
    model : nn.Module
        Any module; nn.Linear and transformers' Conv1D are sites.
    include, exclude : patterns, optional
        Globs on site names; a glob that fits the last dotted part counts too ("lm_head" fits "model.lm_head").
        "re:..." is a regular expression that must fit the whole name. `exclude` wins over `include`. A weight tied to
        another module (the same Parameter) is left out unless `include` names it without a wildcard.

    Raises
    ------
    ZeroskipError
        If an include pattern names no site; it suggests the nearest name.
    """
    return select_sites(model, include, exclude)[0]


def select_sites(
    model: nn.Module, include: str | Iterable[str] | None = None, exclude: str | Iterable[str] | None = ("lm_head",)
) -> tuple[list[Site], dict[str, str]]:
    """As `find_sites`, with the reason for every site that was named out: ({sites}, {name: reason})."""
    expect("model", model, nn.Module, "an nn.Module")
    wanted, unwanted = site_patterns("include", include), site_patterns("exclude", exclude)
    every = [Site(name, module) for name, module in model.named_modules() if _adapter(module) is not None]
    names = [site.name for site in every]
    for pattern in wanted:
        if not any(fits(pattern, name) for name in names):
            raise ZeroskipError(f"include {pattern!r} names no site" + suggest(pattern, names))
    for pattern in unwanted:
        if pattern != "lm_head" and not any(fits(pattern, name) for name in names):
            log.warning("exclude %r names no site%s", pattern, suggest(pattern, names))
    tied = _tied(model)
    sites: list[Site] = []
    skipped: dict[str, str] = {}
    for site in every:
        barred = next((p for p in unwanted if fits(p, site.name)), None)
        if wanted and not any(fits(p, site.name) for p in wanted):
            skipped[site.name] = "not included"
        elif barred is not None:
            skipped[site.name] = f"excluded by {barred!r}"
        elif id(getattr(site.module, "weight", None)) in tied and site.name not in wanted:
            skipped[site.name] = "weight tied to another module; name it in include= to prune both"
        else:
            sites.append(site)
    return sites, skipped


def site_patterns(what: str, given: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return the globs and regular expressions given as `what`, after checking that they are some."""
    if given is not None and not isinstance(given, Iterable):
        raise ZeroskipError(f"{what} is {given!r}: give globs or 're:...' as strings")
    patterns = (given,) if isinstance(given, str) else tuple(given or ())
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ZeroskipError(f"{what} holds {pattern!r}: give globs or 're:...' as strings")
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ZeroskipError(f"{what} {pattern!r} is not a regular expression: {error}") from None
    return patterns


def fits(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.rpartition(".")[2], pattern)


def _tied(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that two modules own."""
    seen: set[int] = set()
    twice: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside what torch.compile made of it; any other model is returned as it is."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # without it there is no such wrapper
    kind = getattr(dynamo, "OptimizedModule", None)
    return cast(nn.Module, model._orig_mod) if kind is not None and isinstance(model, kind) else model


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule `name` of `model`.

    Raises
    ------
    ZeroskipError
        If there is no such submodule.
    """
    parent, _, child = name.rpartition(".")
    try:
        owner = model.get_submodule(parent)
    except AttributeError:
        raise ZeroskipError(f"there is no module {parent!r} to hold {name!r}") from None
    if child not in owner._modules:
        raise ZeroskipError(f"there is no module {name!r}" + suggest(name, [n for n, _ in model.named_modules()]))
    owner._modules[child] = module
