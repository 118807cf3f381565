"""One rule of a recipe: for which layers it is, and what it changes for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zeroskip.errors import ZeroskipError, suggest
from zeroskip.model import fits, site_patterns
from zeroskip.prune.composition import Composition
from zeroskip.prune.patterns import Pattern

__all__ = ["SETTINGS", "Rule", "check_entries", "flag", "tables_rule"]

SETTINGS = ("method", "pattern", "sparsity", "values", "group_size")  # what a rule may change, besides "dense"
TABLES = ("lm_head", "embed_out", "embed_tokens", "embed_in", "wte", "word_embeddings")  # a model has few of them
TABLE_GROUP = {"int8": None, "int4": 64}  # None: as the blocks have it
ENTRIES = ("include", "exclude", "optional", "dense", *SETTINGS)


@dataclass(frozen=True)
class Rule:
    """Settings for some layers.

    Attributes
    ----------
    include, exclude : tuple of str
        As for `find_sites`; without `include` it fits every layer that `exclude` does not.
    optional : bool
        Whether it may fit no layer at all.
    changes : dict
        Some of {"dense", "method", "pattern", "sparsity", "values", "group_size"}.
    where : str
        "rule 2", for messages.
    """

    include: tuple[str, ...]
    exclude: tuple[str, ...]
    optional: bool
    changes: dict[str, Any]
    where: str

    @staticmethod
    def read(given: Any, where: str) -> Rule:
        if not isinstance(given, Mapping):
            raise ZeroskipError(
                f"{where} is a {type(given).__name__}: give a map such as {{include: ..., dense: true}}"
            )
        check_entries(given, ENTRIES, where)
        include, exclude = (site_patterns(f"{where}: {key}", given.get(key)) for key in ("include", "exclude"))
        if not include and not exclude:
            raise ZeroskipError(f"{where} does not say for which layers: give include or exclude")
        optional = flag(given, "optional", where)
        dense = flag(given, "dense", where)
        changes = {key: given[key] for key in SETTINGS if given.get(key) is not None}
        if dense and changes:
            raise ZeroskipError(
                f"{where} leaves its layers dense, and gives them a {next(iter(changes))}: leave one out"
            )
        if "dense" in given:
            changes["dense"] = dense
        try:
            if "method" in changes:
                Composition.parse(changes["method"])
            if "pattern" in changes:
                Pattern.parse(changes["pattern"])
        except ZeroskipError as error:
            raise ZeroskipError(f"{where}: {error}") from None
        if not changes:
            raise ZeroskipError(f"{where} changes nothing: give one of {', '.join(('dense', *SETTINGS))}")
        return Rule(include, exclude, optional, changes, where)

    def fits(self, name: str) -> bool:
        """Whether the rule is for a layer."""
        wanted = not self.include or any(fits(pattern, name) for pattern in self.include)
        return wanted and not any(fits(pattern, name) for pattern in self.exclude)

    @property
    def named(self) -> tuple[str, ...]:
        """Its patterns without a wildcard, which reach layers that nothing else would."""
        if self.changes.get("dense"):
            return ()
        return tuple(p for p in self.include if not p.startswith("re:") and not set(p) & set("*?["))


def check_entries(given: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    """Raise on an entry that is not known; it suggests the nearest."""
    for key in given:
        if key not in known:
            raise ZeroskipError(f"{where} has an unknown entry {key!r}" + suggest(str(key), known))


def flag(given: Mapping[str, Any], key: str, where: str) -> bool:
    """Return an entry that is true or false, false where it is missing."""
    value = given.get(key)
    if value is not None and not isinstance(value, bool):
        raise ZeroskipError(f"{where}: {key} is {value!r}: give true or false")
    return bool(value)


def tables_rule(embeddings: Any) -> list[Rule]:
    """Return the rule that rounds embeddings and head to "int8" or "int4", none for "none" or None."""
    if embeddings is None or embeddings == "none":
        return []
    if not isinstance(embeddings, str) or embeddings not in TABLE_GROUP:
        raise ZeroskipError(
            f"embeddings is {embeddings!r}: give 'int8', 'int4' or 'none'" + suggest(str(embeddings), TABLE_GROUP)
        )
    entries = {"include": TABLES, "optional": True, "method": "rtn", "values": embeddings}
    return [Rule.read(entries | {"group_size": TABLE_GROUP[embeddings]}, "embeddings")]
