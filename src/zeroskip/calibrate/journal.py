"""A directory that lets a killed run go on where it stopped.

journal.json        what the run is: fingerprints of recipe, weights and data
allocation.json     what the budget of the run decided, where it has one
00003.safetensors   the finished weights of the fourth block; once this file is there, the block is finished
00003.json          its report rows, and a hash of all that was recorded of it
00003.scales        of the same kind as the weights: the scales of those that a solver rounded

A file of weights can become a file of the stored model as it is, so it holds nothing else: two equal runs give equal
files. Each file is written beside, flushed to the disk and renamed, so it is there whole or not at all. Random numbers
need no record: every site draws from its own generator, seeded from the recipe and its name, and every forward pass is
seeded. Statistics need none either: they belong to unfinished blocks, and activations are recomputed through the
finished ones by the same steps as in the first run, so the resumed result has the same bits (on the same machine with
the same number of threads).
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from zeroskip.calibrate.data import Batch
from zeroskip.calibrate.digest import digest
from zeroskip.errors import ZeroskipError
from zeroskip.io import container
from zeroskip.io.lock import locked

__all__ = ["Journal"]

log = logging.getLogger(__name__)

VERSION = 3


class Journal:
    """Finished blocks on disk.

    Parameters
    ----------
    path : path-like
        Made if missing.
    model : nn.Module
        Before the run; its weights are hashed.
    recipe : dict
        JSON values.
    batches : list of Batch

    Raises
    ------
    ZeroskipError
        If `path` is a file or a directory of something else, or a journal of another recipe, model or data, or in use,
        or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], model: nn.Module, recipe: Mapping[str, Any], batches: list[Batch]):
        self.path = Path(path)
        self._own: set[int] = set()  # blocks that were recorded by this run
        mine = {
            "version": VERSION,
            "recipe": hashlib.blake2b(json.dumps(recipe, sort_keys=True).encode(), digest_size=16).hexdigest(),
            "weights": digest(dict(model.state_dict(keep_vars=False))).hex(),
            "data": digest([[batch.args, batch.kwargs] for batch in batches]).hex(),
        }
        head = self.path / "journal.json"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = ExitStack()
            free = self._lock.enter_context(locked(self.path))
        except FileExistsError:
            raise ZeroskipError(f"journal {self.path} is a file: name a directory") from None
        except OSError as error:
            raise ZeroskipError(f"journal {self.path} cannot be made: {error.strerror or error}") from error
        try:
            if free is False:
                raise ZeroskipError(f"journal {self.path} is in use by another run: wait for it, or stop it")
            self._begin(head, mine)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other runs use the directory."""
        self._lock.close()

    def _begin(self, head: Path, mine: Mapping[str, Any]) -> None:
        """Check that what is in the directory is of this run, or make the directory one of it."""
        if head.exists():
            try:
                found = json.loads(head.read_text())
                differs = [part for part, value in mine.items() if found.get(part) != value]
            except (ValueError, AttributeError):
                raise ZeroskipError(f"{head} is not readable: delete {self.path} to start anew") from None
            if differs:
                raise ZeroskipError(
                    f"the journal in {self.path} is of another run ({' and '.join(differs)} differ): "
                    "delete it to start anew, or give the model, recipe and data it was started with"
                )
        elif any(self.path.iterdir()) and not all(name.suffix == ".new" for name in self.path.iterdir()):
            raise ZeroskipError(f"journal {self.path} holds other files: name an empty directory")
        else:
            self._write(head, json.dumps(mine, indent=1).encode())

    def files(self) -> list[Path]:
        """The files of the finished blocks."""
        return sorted(self.path.glob("[0-9]*.safetensors"))

    def load(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor], Any] | None:
        """Return (weights by name, scales by site, the rows recorded with them) of a finished block, or None.

        The tensors are mapped: they take no memory of their own until they are written to.

        Raises
        ------
        ZeroskipError
            If a file is missing or damaged, or the weights are not those that were recorded.
        """
        path = self._block(index)
        if not path.exists():
            return None
        beside, about = path.with_suffix(".scales"), path.with_suffix(".json")
        weights = _mapped(path, path)
        scales = _mapped(beside, path) if beside.exists() else {}
        try:
            said = json.loads(about.read_text())
            rows, content = said["rows"], said["content"]
        except (OSError, ValueError, KeyError, TypeError):
            raise _damaged(path, f"{about.name} beside it does not say what it holds") from None
        if index not in self._own and _content(weights, scales, rows) != content:
            raise _damaged(path, "it, its scales or its rows are not what was recorded")
        return weights, scales, rows

    def record(self, index: int, weights: Mapping[str, Tensor], scales: Mapping[str, Tensor], rows: Any) -> None:
        """Write a finished block; when this returns it is on the disk."""
        path = self._block(index)
        if scales:
            self._write(path.with_suffix(".scales"), scales)
        about = {"content": _content(weights, scales, rows), "rows": rows}
        self._write(path.with_suffix(".json"), json.dumps(about, indent=1).encode())
        self._write(path, weights)
        self._own.add(index)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a JSON value that is made once: what the journal holds under this name, or what `make` returns."""
        path = self.path / f"{name}.json"
        if path.exists():
            try:
                return json.loads(path.read_text())
            except ValueError:
                raise ZeroskipError(f"{path} is not readable: delete {self.path} to start anew") from None
        value = make()
        self._write(path, json.dumps(value, indent=1).encode())
        return json.loads(json.dumps(value))

    def _block(self, index: int) -> Path:
        return self.path / f"{index:05d}.safetensors"

    def _write(self, path: Path, content: bytes | Mapping[str, Tensor]) -> None:
        beside = path.with_name(path.name + ".new")
        try:
            beside.unlink(missing_ok=True)  # of a run that was killed
            if isinstance(content, bytes):
                with open(beside, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            else:
                container.write(beside, content, {"format": "pt"})
            os.replace(beside, path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or error
            raise ZeroskipError(f"{path}: cannot be written: {why}; the blocks finished before it are kept") from error
        directory = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _content(weights: Mapping[str, Tensor], scales: Mapping[str, Tensor], rows: Any) -> str:
    return digest([dict(sorted(weights.items())), dict(sorted(scales.items())), json.dumps(rows)]).hex()


def _mapped(path: Path, block: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(block, f"{path.name}: {error}") from None


def _damaged(path: Path, why: str) -> ZeroskipError:
    return ZeroskipError(f"{path} is damaged ({why}): delete it, and the run goes on from there")


def site_seed(seed: int, name: str) -> int:
    """Return the seed of one site's generator: of the run's seed and the site's name only."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest(), "little")


def generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    """Return the generator of one site."""
    return torch.Generator(device).manual_seed(site_seed(seed, name))
