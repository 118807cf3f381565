"""A directory that lets a killed run go on where it stopped.

journal.json        what the run is: fingerprints of recipe, weights and data
allocation.json     what the budget of the run decided, where it has one
00003.safetensors   the finished weights of the fourth block; its metadata holds the report rows

Each file is written beside, flushed to the disk and renamed, so it is there whole or not at all. Random numbers need
no record: every site draws from its own generator, seeded from the recipe and its name, and every forward pass is
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
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from zeroskip.calibrate.data import Batch
from zeroskip.calibrate.digest import digest
from zeroskip.errors import ZeroskipError

__all__ = ["Journal"]

log = logging.getLogger(__name__)

VERSION = 1


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
        If `path` is a file or a directory of something else, or a journal of another recipe, model or data, or cannot
        be written.
    """

    def __init__(self, path: str | os.PathLike[str], model: nn.Module, recipe: Mapping[str, Any], batches: list[Batch]):
        self.path = Path(path)
        mine = {
            "version": VERSION,
            "recipe": hashlib.blake2b(json.dumps(recipe, sort_keys=True).encode(), digest_size=16).hexdigest(),
            "weights": digest(dict(model.state_dict(keep_vars=False))).hex(),
            "data": digest([[batch.args, batch.kwargs] for batch in batches]).hex(),
        }
        head = self.path / "journal.json"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise ZeroskipError(f"journal {self.path} is a file: name a directory") from None
        except OSError as error:
            raise ZeroskipError(f"journal {self.path} cannot be made: {error.strerror or error}") from error
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

    def load(self, index: int) -> tuple[dict[str, Tensor], Any] | None:
        """Return (weights by name, the value recorded with them) of a finished block, or None."""
        path = self.path / f"{index:05d}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["rows"])  # noqa: SIM118
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ZeroskipError(f"{path} is damaged ({error}): delete it, and the run goes on from there") from None

    def record(self, index: int, weights: Mapping[str, Tensor], rows: Any) -> None:
        """Write a finished block; when this returns it is on the disk."""
        kept = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        self._write(self.path / f"{index:05d}.safetensors", save(kept, metadata={"rows": json.dumps(rows)}))

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

    def _write(self, path: Path, content: bytes) -> None:
        beside = path.with_name(path.name + ".new")
        try:
            with open(beside, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
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


def site_seed(seed: int, name: str) -> int:
    """Return the seed of one site's generator: of the run's seed and the site's name only."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest(), "little")


def generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    """Return the generator of one site."""
    return torch.Generator(device).manual_seed(site_seed(seed, name))
