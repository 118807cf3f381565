"""The lock of a directory, which ends with the process that holds it, however that ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["locked"]


@contextmanager
def locked(directory: Path) -> Iterator[bool | None]:
    """Hold the lock of a directory; yields whether it was had, None where the file system knows no locks."""
    handle = os.open(directory, os.O_RDONLY)
    had: bool | None = True
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            had = False
        except OSError:
            had = None
        yield had
    finally:
        os.close(handle)
