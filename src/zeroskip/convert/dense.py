"""Ordinary weights with zeros in them: what every format is turned into, and what plain transformers loads."""

from __future__ import annotations

from zeroskip.convert.base import Format, Stored

__all__ = ["Dense"]


class Dense(Format):
    name = "dense"
    reads = False
    writes = True

    def write(self, stored: Stored, old_names: bool) -> list[str]:
        return []
