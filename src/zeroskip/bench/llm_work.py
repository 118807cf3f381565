"""The folder of a benchmark of language models: models in every stage and other libraries' files, each made once.

Pruning, converting and packing a billion weights takes longer than all races. None of it is timed, so a later run with
the same models goes on with what it finds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zeroskip.errors import ZeroskipError
from zeroskip.io.save import check_new, write_json

__all__ = ["Work"]

SCHEMA = 1


class Work:
    """One such folder, and its file made.json, which says what is in it.

    Parameters
    ----------
    folder : Path
        New, empty, or of an earlier run.
    about : {name: value}
        What decides on the models, recipes left out; plain data.

    Raises
    ------
    ZeroskipError
        If there is something else, or other models.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder, self._file = folder, folder / "made.json"
        about = _plain(about)
        self._told: dict[str, Any] = {"schema": SCHEMA, "about": about, "models": {}, "peers": {}}
        if not self._file.exists():
            self.folder = check_new(folder)
            self._file = self.folder / "made.json"
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write()
            return
        try:
            self._told = json.loads(self._file.read_text(encoding="utf-8"))
            there, known = self._told["schema"], self._told["about"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ZeroskipError(
                f"{self._file}: cannot be read ({type(error).__name__}): remove the directory"
            ) from None
        if there != SCHEMA or known != about:
            other = [name for name in about if known.get(name) != about[name]]
            asked = ", ".join(f"{name} {known.get(name)!r} and not {about[name]!r}" for name in other)
            raise ZeroskipError(f"{folder}: holds models of {asked or 'another version'}: name another directory")

    def place(self, name: str) -> Path:
        """Return where a model of this name is stored."""
        return self.folder / name

    def cleared(self, name: str) -> Path:
        """Return that place without what an earlier run has left there."""
        where = self.place(name)
        if where.exists():
            shutil.rmtree(where)
        return where

    def model(self, name: str, asked: Mapping[str, Any]) -> Any:
        """Return what `add_model` was told of the model under this name, if `asked` makes it; None if not."""
        known = self._told["models"].get(name)
        if known is None or known["asked"] != _plain(asked) or not self.place(name).exists():
            return None
        return known["told"]

    def add_model(self, name: str, asked: Mapping[str, Any], told: Any) -> None:
        """Write down what was asked for to have the model in a place, and what is to be known of it; plain data."""
        self._told["models"][name] = _plain({"asked": asked, "told": told})
        self._write()

    def peer(self, name: str) -> dict[str, int] | None:
        """Return the bytes of each mode of a peer whose files are here."""
        sizes: dict[str, int] | None = self._told["peers"].get(name)
        return sizes

    def add_peer(self, name: str, sizes: Mapping[str, int]) -> None:
        self._told["peers"][name] = dict(sizes)
        self._write()

    def _write(self) -> None:
        write_json(self._file, self._told)


def _plain(value: Any) -> Any:
    """Return what JSON makes of it."""
    return json.loads(json.dumps(value))
