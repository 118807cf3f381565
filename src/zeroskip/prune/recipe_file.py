"""Recipes as files: YAML 1.2's plain values, read strictly, and the recipes that come with the package.

PyYAML reads YAML 1.1, in which `2:4` is the number 124 and `no` is false; here both are text, as YAML 1.2 has it.
"""

from __future__ import annotations

import json
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from zeroskip.errors import ZeroskipError, first_line, suggest

__all__ = ["load_recipe", "read_yaml", "recipes"]

COLON = "_"  # stands for ':' in the names of the files that come with the package
LARGEST_BYTES = 1 << 20


def recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    files = (file.name for file in resources.files("zeroskip").joinpath("recipes").iterdir())
    return sorted(name.removesuffix(".yaml").replace(COLON, ":") for name in files if name.endswith(".yaml"))


def load_recipe(name: str | os.PathLike[str]) -> Any:
    """Return what a recipe says, not yet checked.

    Parameters
    ----------
    name : str or path
        One of `recipes()`, a YAML file, or the directory of a stored model, for the recipe it was pruned by.

    Raises
    ------
    ZeroskipError
        If there is no such recipe, or it cannot be read as YAML; with the line.
    """
    if isinstance(name, str) and name in recipes():
        file = resources.files("zeroskip").joinpath("recipes", f"{name.replace(':', COLON)}.yaml")
        return read_yaml(file.read_text(encoding="utf-8"), f"recipe {name}")
    path = Path(name)
    if path.is_dir():
        return _stored(path)
    if isinstance(name, str) and not path.suffix and os.sep not in name and not path.exists():
        raise ZeroskipError(f"unknown recipe {name!r}" + suggest(name, recipes()) + ", and no file of that name")
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise ZeroskipError(f"recipe {path}: larger than a megabyte: give a YAML file of rules")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ZeroskipError(f"recipe {path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ZeroskipError(f"recipe {path}: is not UTF-8 text (byte {error.start})") from None
    return read_yaml(text, f"recipe {path}")


def _stored(directory: Path) -> Any:
    """The recipe that a stored model was pruned by."""
    for file, section in (("zeroskip.json", None), ("config.json", "quantization_config")):
        try:
            info = json.loads((directory / file).read_text(encoding="utf-8"))
            recipe = (info if section is None else info[section])["recipe"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(recipe, dict):
            return recipe
    raise ZeroskipError(f"recipe {directory}: a directory without the recipe of a model that zeroskip pruned")


def read_yaml(text: str, where: str) -> Any:
    """Read one YAML document of plain values.

    Raises
    ------
    ZeroskipError
        Naming `where` and the line: bad syntax, a key given twice, a tag.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f" line {mark.line + 1}:"
        what = " ".join((error.problem or "bad syntax").split())
        quote = " (quote a pattern that starts with '*')" if "alias" in f"{error.context} {error.problem}" else ""
        raise ZeroskipError(f"{where}:{line} {what}{quote}") from None
    except yaml.YAMLError as error:
        raise ZeroskipError(f"{where}: {first_line(error)}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise ZeroskipError(f"{where}: {first_line(error)}") from None


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Maps, lists, strings, and the numbers, booleans and null of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


def _map(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    out: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} is no name", key_node.start_mark)
        if key in out:
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
        out[key] = loader.construct_object(value_node, deep=True)
    return out


for tag, pattern, first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern})$"), list(first))
_Loader.add_constructor("tag:yaml.org,2002:map", _map)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))
