"""What a directory says about a model beside its tensors: the sites, the plan, the recipe, the report.

The same dictionary is `quantization_config` in the config.json of a compiled transformers model and zeroskip.json
everywhere else. `describe` makes it, `check` doubts one that was read, `restore` gives its contents back to a model.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from zeroskip.errors import ZeroskipError
from zeroskip.io.kinds.dense import finish, straighten
from zeroskip.io.sites import describe_sites, site_problem
from zeroskip.io.tensors import dtype_name, is_float, tensors_of

__all__ = ["FORMAT_VERSION", "SIDECAR", "attach", "check", "describe", "is_pretrained", "restore"]

FORMAT_VERSION = 1
SIDECAR = "zeroskip.json"


def is_pretrained(model: nn.Module) -> bool:
    """Whether this is a transformers model; transformers is not imported to find out."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def attach(model: nn.Module) -> None:
    """Make a model that was just compiled (or put back) behave in transformers; nothing to do for any other module."""
    if is_pretrained(model):
        from zeroskip import hf

        hf.attach(model)


def describe(model: nn.Module) -> dict[str, Any]:
    """Return what must be stored beside the tensors to rebuild `model`, as plain values for JSON."""
    sites = describe_sites(model)
    dtype, dtypes = _dtypes(model, sites)
    plan, report = (_plain(getattr(model, f"zeroskip_{what}", None)) for what in ("plan", "report"))
    return {
        "format_version": FORMAT_VERSION,
        "written_with": {what: _version(what) for what in ("zeroskip", "torch", "transformers")},
        "sites": sites,
        "dtype": dtype,
        "dtypes": dtypes,
        "plan": plan,
        "recipe": report.get("recipe") if isinstance(report, dict) else None,
        "report": report,
    }


def _dtypes(model: nn.Module, sites: Mapping[str, Any]) -> tuple[str | None, dict[str, str]]:
    """Return the model's dtype, and that of the tensors outside the sites that have another one."""
    floats = {
        name: tensor.dtype
        for name, tensor in tensors_of(model).items()
        if tensor.dtype.is_floating_point and name.rpartition(".")[0] not in sites
    }
    first: Any = model.dtype if is_pretrained(model) else next(iter(floats.values()), None)
    main = None if first is None else dtype_name(first)
    return main, {name: dtype_name(dtype) for name, dtype in floats.items() if dtype != first}


def _plain(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else value


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def check(info: Any, where: str | Path) -> dict[str, Any]:
    """Return `info` if it is well-formed and of a version we read.

    Raises
    ------
    ZeroskipError
        Naming `where`, the field and the problem.
    """
    if not isinstance(info, dict):
        raise ZeroskipError(f"{where}: the zeroskip section is a {type(info).__name__}, not an object")
    version = info.get("format_version")
    if type(version) is not int or version < 1:
        raise ZeroskipError(f"{where}: format_version {version!r} is not a positive whole number")
    if version > FORMAT_VERSION:
        raise ZeroskipError(f"{where}: format version {version}; this zeroskip reads up to {FORMAT_VERSION}, update it")
    for field in ("sites", "dtypes"):
        if not isinstance(info.get(field), dict):
            raise ZeroskipError(f"{where}: {field} is missing or not an object")
    for name, site in info["sites"].items():
        problem = site_problem(site)
        if problem is not None:
            raise ZeroskipError(f"{where}: site {name}: {problem}")
    for name, dtype in info["dtypes"].items():
        if not is_float(dtype):
            raise ZeroskipError(f"{where}: dtypes: {name}: {dtype!r} is not a floating-point type")
    tied = info.get("tied")
    if tied is not None and not (isinstance(tied, dict) and all(isinstance(source, str) for source in tied.values())):
        raise ZeroskipError(f"{where}: tied does not map names to names")
    return info


def restore(model: nn.Module, info: Mapping[str, Any], where: str | Path) -> None:
    """Give a loaded model its plan and report back, and set its sites up as the plan says.

    Raises
    ------
    ZeroskipError
        If the plan or the report cannot be read.
    """
    from zeroskip.planning.install import apply_tuning
    from zeroskip.planning.plan import Plan
    from zeroskip.prune.report import Report

    turned = straighten(model, info["sites"])
    for what, kind in (("plan", Plan), ("report", Report)):
        stored = info.get(what)
        if stored is None:
            continue
        try:
            value: Any = kind.from_dict(stored)
            if what == "plan":
                apply_tuning(model, value)
        except ZeroskipError as error:
            raise ZeroskipError(f"{where}: the {what} cannot be used: {error}") from error
        except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise ZeroskipError(f"{where}: the {what} cannot be used: {error!r}") from error
        object.__setattr__(model, f"zeroskip_{what}", value)
    finish(model, info["sites"], _dtypes(model, info["sites"])[0], turned)
