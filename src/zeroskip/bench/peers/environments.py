"""Where the environments of the peers are, and how one is made: ZEROSKIP_PEERS/<name>, a virtual environment each."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from zeroskip.bench.peers.base import get, names
from zeroskip.errors import ZeroskipError, suggest

__all__ = ["choose", "folder", "install", "missing", "python_of"]


def folder() -> Path:
    """Return the folder of all environments: ZEROSKIP_PEERS, else ``~/.cache/zeroskip/peers``."""
    if given := os.environ.get("ZEROSKIP_PEERS"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zeroskip" / "peers"


def choose(asked: str) -> list[str]:
    """Read ``'auto'`` (all peers), ``'none'``, or names with commas.

    Raises
    ------
    ZeroskipError
        On an unknown name.
    """
    if asked in ("auto", "none"):
        return names() if asked == "auto" else []
    given = [name.strip() for name in asked.split(",") if name.strip()]
    if not given:
        raise ZeroskipError(f"--peers {asked!r}: give 'auto', 'none' or names with commas, of {', '.join(names())}")
    for name in given:
        _known(name)
    return list(dict.fromkeys(given))


def python_of(name: str) -> Path:
    """Return the Python that a peer runs in, whether or not it is there."""
    return folder() / name / "bin" / "python" if get(name).requires else Path(sys.executable)


def missing(name: str) -> str | None:
    """Return None if the peer's environment is there, else how to make it."""
    if python_of(name).exists():
        return None
    return f"not installed: zeroskip bench peers --install {name}"


def install(name: str) -> Path:
    """Make a peer's environment with venv and pip, from scratch; pip's own messages go to stderr.

    Raises
    ------
    ZeroskipError
        Unknown name, no Python of the version that it needs, or pip failed.
    """
    _known(name)
    peer = get(name)
    if not peer.requires:
        raise ZeroskipError(f"{name} needs no environment: it runs in this one")
    python = _python(name, peer.python)
    home = folder() / name
    shutil.rmtree(home, ignore_errors=True)
    home.parent.mkdir(parents=True, exist_ok=True)
    pip = [str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", *peer.requires]
    for command in ([python, "-m", "venv", str(home)], pip):
        done = subprocess.run(command, stdout=sys.stderr, env=os.environ | dict(peer.build))
        if done.returncode:
            shutil.rmtree(home, ignore_errors=True)
            raise ZeroskipError(f"{name}: `{shlex.join(command)}` failed with code {done.returncode}; see above")
    return home


def _python(name: str, version: str | None) -> str:
    if version is None or version == ".".join(map(str, sys.version_info[:2])):
        return sys.executable
    found = shutil.which(f"python{version}")
    if found is None:
        raise ZeroskipError(f"{name} has wheels for Python {version} only: put a python{version} on PATH")
    return found


def _known(name: str) -> None:
    if name not in names():
        raise ZeroskipError(f"unknown peer {name!r}{suggest(name, names())}")
