"""A plan: what `zs.compile` measured on this machine, what it chose at every site, and why. It prints and it saves."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from zeroskip.errors import ZeroskipError
from zeroskip.ops import ACTIVATIONS
from zeroskip.planning.machine import Machine
from zeroskip.planning.site_plan import SitePlan, by_tokens
from zeroskip.planning.tokens import Tokens

__all__ = ["Folded", "Fused", "ModelCheck", "Plan", "SitePlan", "check_prefer", "plain", "plan_of"]

VERSION = 1
PREFERENCES = ("speed", "bytes")


def check_prefer(prefer: str) -> str:
    """Return `prefer` if it is one of PREFERENCES; raises ZeroskipError if not."""
    if prefer in PREFERENCES:
        return prefer
    raise ZeroskipError(f"prefer is {prefer!r}: give {' or '.join(map(repr, PREFERENCES))}")


@dataclass
class ModelCheck:
    """The whole model against its dense self.

    Attributes
    ----------
    mode : str
        ``'eager'``: both sides run eagerly; ``'compiled'``: both under torch.compile.
    outcome : str
        ``'kept'``, ``'put back'`` or ``'skipped'``.
    method : str
        How the two were compared, or why they were not.
    ratios : {tokens: (ratio, low, high)}
        Time of the dense model over time of the compiled one, with its interval; tokens 0 is `example_inputs`.
    """

    mode: str
    outcome: str
    method: str
    ratios: dict[int, tuple[float, float, float]] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelCheck:
        ratios = {int(t): (float(r[0]), float(r[1]), float(r[2])) for t, r in data["ratios"].items()}
        return cls(data["mode"], data["outcome"], data["method"], ratios)

    def __str__(self) -> str:
        if not self.ratios:
            return f"whole model ({self.mode}): {self.outcome}: {self.method}"
        each = ", ".join(
            f"{ratio:.2f}x ({low:.2f}-{high:.2f}) {f'at {t} token' + 's' * (t > 1) if t else 'on the example inputs'}"
            for t, (ratio, low, high) in self.ratios.items()
        )
        return f"whole model ({self.mode}): {each}; {self.outcome}"


@dataclass
class Fused:
    """Packed layers that are fed the same tensor and computed in one call.

    Attributes
    ----------
    names : list of str
        The sites, in the order of their calls.
    ratios : {tokens: ratio}
        How much faster than one after the other, as measured on groups of this kind.
    """

    names: list[str]
    ratios: dict[int, float] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Fused:
        return cls([str(name) for name in data["names"]], by_tokens(data["ratios"]))


@dataclass
class Folded:
    """An activation that the packed layer before it computes.

    Attributes
    ----------
    layer, activation : str
        Their names in the model.
    function : str
        Of `zeroskip.ops.ACTIVATIONS`.
    """

    layer: str
    activation: str
    function: str

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Folded:
        names = [data[each] for each in ("layer", "activation", "function")]
        if not all(isinstance(name, str) for name in names) or names[2] not in ACTIVATIONS[1:]:
            raise ValueError(f"no activation that a layer computes: {data}")
        return cls(*names)


@dataclass
class Plan:
    """What was measured and chosen; `str(plan)` is a table.

    Attributes
    ----------
    machine : Machine
        Where it was measured; on any other the sites are measured again.
    tokens, precision : Tokens, str or None
        The counts it is good at; as asked for.
    sites : list of SitePlan
    checks : list of ModelCheck
        The whole model against its dense self.
    notes : list of str
        Layers that were left alone and why, kernels that failed the oracle, anything else worth knowing.
    fused : list of Fused
        Groups of packed sites that are computed in one call.
    folded : list of Folded
        Activations that the packed site before them computes.
    batch_invariant, rows : bool, list of str
        Whether every row of a site's output has the same bits whatever else is in the batch; the layers that torch
        computes one row at a time for that.
    prefer : "speed" or "bytes"
        What a site's layout was chosen for, as asked.
    """

    machine: Machine
    tokens: Tokens
    precision: str | None
    sites: list[SitePlan] = field(default_factory=list)
    checks: list[ModelCheck] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fused: list[Fused] = field(default_factory=list)
    batch_invariant: bool = False
    rows: list[str] = field(default_factory=list)
    folded: list[Folded] = field(default_factory=list)
    prefer: str = "speed"

    @property
    def bytes_before(self) -> int:
        return sum(site.bytes_before for site in self.sites)

    @property
    def bytes_after(self) -> int:
        return sum(site.bytes_after for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON holds."""
        return {
            "version": VERSION,
            "machine": self.machine.to_dict(),
            "tokens": self.tokens.to_dict(),
            "precision": self.precision,
            "sites": [plain(asdict(site)) for site in self.sites],
            "checks": [plain(asdict(check)) for check in self.checks],
            "notes": list(self.notes),
            "fused": [plain(asdict(group)) for group in self.fused],
            "batch_invariant": self.batch_invariant,
            "rows": list(self.rows),
            "folded": [asdict(pair) for pair in self.folded],
            "prefer": self.prefer,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Read what `to_dict` wrote.

        Raises
        ------
        ZeroskipError
            If it is not a plan, or one of a newer version.
        """
        version = data.get("version") if isinstance(data, dict) else None
        if version != VERSION:
            raise ZeroskipError(f"not a plan of version {VERSION} (version is {version!r}); compile the model again")
        try:
            weights = data["tokens"]["weights"]
            counts = [int(count) for count in data["tokens"]["counts"]]
            tokens = Tokens.parse(counts if weights is None else dict(zip(counts, weights, strict=True)))
            sites = [SitePlan.from_dict(site) for site in data["sites"]]
            checks = [ModelCheck.from_dict(check) for check in data["checks"]]
            machine = Machine.from_dict(data["machine"])
            fused = [Fused.from_dict(group) for group in data.get("fused", [])]
            held, rows = bool(data.get("batch_invariant", False)), [str(name) for name in data.get("rows", [])]
            folded = [Folded.from_dict(pair) for pair in data.get("folded", [])]
            notes, prefer = list(data["notes"]), check_prefer(data.get("prefer", "speed"))
            made = cls(machine, tokens, data["precision"], sites, checks, notes, fused, held, rows, folded, prefer)
            # What can be neither printed nor written again was not written by us.
            _ = str(made), json.dumps(made.to_dict(), allow_nan=False)
            return made
        except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise ZeroskipError(f"the plan is damaged: {error!r}; compile the model again") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; an older file at `path` is replaced only once the new one is complete.

        Raises
        ------
        ZeroskipError
            If it cannot be written there.
        """
        target = Path(path)
        beside = target.with_name(target.name + ".partial")
        try:
            beside.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
            beside.replace(target)
        except OSError as error:
            raise ZeroskipError(f"{path}: cannot be written: {error.strerror or error}") from error
        finally:
            with suppress(OSError):
                beside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that `save` wrote.

        Raises
        ------
        ZeroskipError
            If the file cannot be read or holds no plan; the message names it.
        """
        try:
            data = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ZeroskipError(f"cannot read a plan from {path}: {error}") from error
        try:
            return cls.from_dict(data)
        except ZeroskipError as error:
            raise ZeroskipError(f"{path}: {error}") from error

    def __str__(self) -> str:
        from zeroskip.planning.report import plan_table

        return plan_table(self)


def plan_of(model: nn.Module) -> Plan:
    """Return the plan that a compiled model carries.

    Raises
    ------
    ZeroskipError
        If the model was not compiled.
    """
    plan = getattr(model, "zeroskip_plan", None)
    if not isinstance(plan, Plan):
        raise ZeroskipError(f"this {type(model).__name__} carries no plan; run zs.compile on it first")
    return plan


def plain(value: Any) -> Any:
    """Return dicts and lists with string keys, as JSON has them."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value
