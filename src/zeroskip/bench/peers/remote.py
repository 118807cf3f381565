"""A peer as this process sees it: its worker, the words exchanged with it, and a clock that leaves them out."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zeroskip.bench.peers.base import get
from zeroskip.bench.peers.environments import python_of
from zeroskip.errors import ZeroskipError

__all__ = ["PeerError", "PeerProcess", "WorkClock"]

WORKER = Path(__file__).with_name("worker.py")
PATIENCE_S = 300.0  # loading a weight of hundreds of MB takes a minute; beyond this the worker hangs


class PeerError(ZeroskipError):
    """A peer could not do what it was asked, in one line."""


class WorkClock:
    """Seconds, of which the talk with a worker is replaced by the seconds that the worker reports."""

    def __init__(self) -> None:
        self._away = 0.0

    def __call__(self) -> float:
        return time.perf_counter() - self._away

    def replace(self, start: float, seconds: float) -> None:
        """Count what happened since `start` (by time.perf_counter) as `seconds`."""
        self._away += time.perf_counter() - start - seconds


class PeerProcess:
    """The worker of one peer, from its start to the end of the `with` block."""

    def __init__(self, name: str, worker: Path = WORKER, patience_s: float = PATIENCE_S) -> None:
        self.name, self.peer = name, get(name)
        self._worker, self._patience_s = worker, patience_s
        self._process: subprocess.Popen[bytes] | None = None
        self._loaded: dict[str, tuple[Any, int, Tensor]] = {}

    def __enter__(self) -> PeerProcess:
        self._folder = tempfile.TemporaryDirectory(prefix="zeroskip-peer-")
        self._errors = open(self._path("stderr"), "w+b")
        self._start()
        return self

    def _start(self) -> None:
        # -I: neither this package nor a PYTHONPATH of ours reaches into the peer's environment.
        self._process = subprocess.Popen(
            [str(python_of(self.name)), "-I", str(self._worker), self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
        )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
        self._errors.close()
        self._folder.cleanup()

    def close(self) -> None:
        """End the worker."""
        if self._process is None:
            return
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def version(self) -> str:
        """Return the version of the peer's library; raises PeerError where it cannot be imported."""
        return str(self._ask(do="hello")["version"])

    def load(self, mode: str, weight: Tensor, copies: int, threads: int, tokens: int) -> tuple[int, Tensor]:
        """Have fp32 `weight` [m, k] loaded `copies` times in one mode, if that is not what is loaded.

        A worker that has died of something else is started again.

        Returns
        -------
        int, Tensor [m, k]
            Bytes of one stored weight, and the weight that it stands for.
        """
        if self._process is None:
            self._loaded.clear()
            self._start()
        key = (weight.data_ptr(), weight.shape, copies, threads, tokens if self.peer.fixed_tokens else 0)
        if mode not in self._loaded or self._loaded[mode][0] != key:
            self._loaded.pop(mode, None)
            np.save(self._path("w.npy"), weight.numpy())
            paths = {"weight": self._path("w.npy"), "stands": self._path("s.npy")}
            told = self._ask(do="load", mode=mode, copies=copies, threads=threads, tokens=tokens, **paths)
            stands = torch.from_numpy(np.load(paths["stands"])) if told["rounded"] else weight
            self._loaded[mode] = (key, int(told["nbytes"]), stands)
        return self._loaded[mode][1:]

    def check(self, mode: str, x: Tensor) -> Tensor:
        """Return y [tokens, m] for fp32 x [tokens, k]; `seconds` then times the same x."""
        np.save(self._path("x.npy"), x.numpy())
        self._ask(do="check", mode=mode, x=self._path("x.npy"), y=self._path("y.npy"))
        y = np.load(self._path("y.npy"))
        return torch.from_numpy(np.ascontiguousarray(y))

    def seconds(self, mode: str) -> float:
        """Return the seconds of one multiplication: the mean of one batch over all copies."""
        return float(self._ask(do="time", mode=mode)["seconds"])

    def timed(self, mode: str, clock: WorkClock) -> None:
        """As `seconds`, for a race that runs by `clock`."""
        start = time.perf_counter()
        clock.replace(start, self.seconds(mode))

    def forget(self) -> None:
        """Have the loaded weights dropped."""
        if self._loaded:
            self._loaded.clear()
            self._ask(do="forget")

    def _path(self, name: str) -> str:
        return os.path.join(self._folder.name, name)

    def _ask(self, **words: Any) -> dict[str, Any]:
        if self._process is None:
            raise PeerError(f"{self.name}: its process has ended")
        into, out = self._process.stdin, self._process.stdout
        if into is None or out is None:
            raise PeerError(f"{self.name}: its process has no pipes")
        try:
            into.write(json.dumps(words).encode() + b"\n")
            answer = self._line(out.fileno())
            told: dict[str, Any] = json.loads(answer)
        except (OSError, ValueError) as error:
            self.close()
            raise PeerError(f"{self.name}: {self._last_words(words['do'])}") from error
        if "error" in told:
            raise PeerError(f"{self.name}: {told['error']}")
        return told

    def _line(self, pipe: int) -> bytes:
        """Read one line; OSError where none comes in time or the pipe has ended."""
        got, until = b"", time.monotonic() + self._patience_s
        while not got.endswith(b"\n"):
            ready, _, _ = select.select([pipe], [], [], max(0.0, until - time.monotonic()))
            part = os.read(pipe, 65536) if ready else b""
            if not part:
                raise OSError("no answer" if not ready else "ended")
            got += part
        return got

    def _last_words(self, job: str) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"its process failed at {job!r}" + (f": {lines[-1].strip()}" if lines else "")
