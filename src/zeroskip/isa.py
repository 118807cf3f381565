"""Which ISA rows this CPU offers, and which is in force."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from zeroskip import _core
from zeroskip.errors import ZeroskipError
from zeroskip.startup import is_command_line

__all__ = ["Isa", "isa", "limit_to_environment"]

VARIABLE = "ZEROSKIP_ISA"


@dataclass(frozen=True)
class Isa:
    """`active` row, `available` rows lowest first, and what each `unavailable` row lacks here."""

    active: str
    available: tuple[str, ...]
    unavailable: dict[str, str]

    def __str__(self) -> str:
        lacking = "".join(f"; {row} lacks {what}" for row, what in self.unavailable.items())
        return f"{self.active} (of {' '.join(self.available)}{lacking})"


def isa() -> Isa:
    """The ISA rows of this process."""
    rows = _core.isa_rows()
    return Isa(
        _core.isa_active(),
        tuple(name for name, lack in rows if lack is None),
        {name: lack for name, lack in rows if lack is not None},
    )


def limit_to_environment() -> None:
    """Obey ZEROSKIP_ISA; an unknown or unavailable row raises ZeroskipError naming what this CPU offers.

    This runs when the package is imported, before the command line can catch anything; there the error is one line
    and exit code 2, as everywhere.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted or _core.isa_limit(wanted):
        return
    here = isa()
    lack = here.unavailable.get(wanted)
    reason = f"this CPU lacks {lack}" if lack else "there is no such row"
    error = ZeroskipError(f"{VARIABLE}={wanted}: {reason}; this CPU offers {' '.join(here.available)}")
    if is_command_line():
        sys.stderr.write(f"zeroskip: {error}\n")
        raise SystemExit(2)
    raise error
