"""Other libraries in the races of whole language models: the same weights in their own files and processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from zeroskip.bench import peers
from zeroskip.bench.llm_make import DENSE
from zeroskip.bench.llm_results import Contender, Footprint
from zeroskip.bench.llm_work import Work
from zeroskip.bench.peers.environments import missing
from zeroskip.bench.peers.remote import WORKER, PeerError, PeerProcess, WorkClock

__all__ = ["ModelProcess", "Rival", "Rivals", "why_not"]

WRONG = 0.1  # the least rounded model whose logits differ by more of the largest one was converted wrongly
PATIENCE_S = 1800.0  # quantising a billion weights takes minutes


def why_not(peer: str) -> str | None:
    """Return why a peer runs no whole model here; None if it can."""
    if not peers.get(peer).model_modes:
        return f"it runs no whole models here; for its products alone: zeroskip bench kernels --peers {peer}"
    return missing(peer)


class ModelProcess(PeerProcess):
    """The worker of a peer that runs whole models; each method is one word of its protocol."""

    def __init__(self, name: str, worker: Path = WORKER) -> None:
        super().__init__(name, worker, PATIENCE_S)

    def __enter__(self) -> ModelProcess:
        super().__enter__()
        return self

    def make(self, folder: Path, into: Path) -> dict[str, int]:
        """Have the model of a Hugging Face directory written: {mode: bytes of its file}."""
        return {
            mode: int(size) for mode, size in self._ask(do="make", folder=str(folder), into=str(into))["bytes"].items()
        }

    def open(self, mode: str, into: Path, threads: int) -> tuple[float, int]:
        """Have it loaded; return the seconds that took and the bytes of its weights."""
        told = self._ask(do="open", mode=mode, into=str(into), threads=threads)
        return float(told["seconds"]), int(told["nbytes"])

    def ready(self, mode: str, ids: Tensor, decode: bool) -> None:
        """Say which prompts [batch, tokens] follow; with `decode` they are read already."""
        np.save(self._path("ids.npy"), ids.numpy())
        self._ask(do="ready", mode=mode, ids=self._path("ids.npy"), decode=decode)

    def took(self, mode: str, what: str) -> float:
        """Return the seconds of one ``'first'`` token or one ``'step'`` of all prompts."""
        return float(self._ask(do=what, mode=mode)["seconds"])

    def timed_model(self, mode: str, what: str, clock: WorkClock) -> None:
        """As `took`, for a race that runs by `clock`."""
        start = time.perf_counter()
        clock.replace(start, self.took(mode, what))

    def logits(self, mode: str) -> Tensor:
        """Return those of the last token that was run, [vocabulary] fp32."""
        self._ask(do="logits", mode=mode, y=self._path("y.npy"))
        return torch.from_numpy(np.load(self._path("y.npy")))

    def losses(self, mode: str, windows: Tensor) -> tuple[float, int]:
        """Return the negative log-likelihoods of all tokens of [windows, tokens] but the first, added, and how many."""
        np.save(self._path("ids.npy"), windows.numpy())
        told = self._ask(do="losses", mode=mode, ids=self._path("ids.npy"))
        return float(told["nll"]), int(told["tokens"])

    def shut(self, mode: str) -> None:
        """Have it freed."""
        self._ask(do="shut", mode=mode)

    def peak_bytes(self) -> int | None:
        """Return the most that its process has had in memory."""
        peak = self._ask(do="memory")["peak_bytes"]
        return None if peak is None else int(peak)


class Rival:
    """One mode of a peer, in the races: its contender and its process."""

    def __init__(self, contender: Contender, process: ModelProcess, mode: str) -> None:
        self.contender, self.process, self.mode = contender, process, mode

    def runner(self, what: str, ids: Tensor, clock: WorkClock) -> Callable[[], object]:
        """Return what a race calls: ``'decode'`` one step after `ids`, else their first token."""
        self.process.ready(self.mode, ids, what == "decode")
        return partial(self.process.timed_model, self.mode, "step" if what == "decode" else "first", clock)

    def perplexity(self, windows: Tensor) -> dict[str, object]:
        """Return what `zeroskip.perplexity` tells, of windows that do not overlap."""
        started = time.perf_counter()
        nll, tokens = self.process.losses(self.mode, windows)
        told = {"value": math.exp(nll / tokens), "nll": nll / tokens, "tokens": tokens, "windows": len(windows)}
        size = windows.shape[1]
        return told | {"context": size, "stride": size, "dtype": self.mode, "seconds": time.perf_counter() - started}


class Rivals:
    """All that take part; their processes end with the `with` block.

    Parameters
    ----------
    names, modes : sequence of str
        Peers; which of their modes, all if empty.
    work : Work
        Holds the dense model in bf16; each peer's files go to its own folder there.
    """

    def __init__(self, names: Sequence[str], modes: Sequence[str], work: Work) -> None:
        self.names, self.modes, self.work = names, modes, work
        self.found: list[Rival] = []
        self.missing: dict[str, str] = {}
        self._processes: dict[str, ModelProcess] = {}

    def __enter__(self) -> Rivals:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in self._processes.values():
            process.__exit__(kind, error, at)

    def make(self) -> None:
        """Have the files of those that can take part written, where they are not there; what cannot is in `missing`."""
        for name in self.names:
            why = why_not(name)
            if why is not None:
                self.missing[name] = why
                continue
            process = self._processes[name] = ModelProcess(name)
            process.__enter__()
            if self.work.peer(name) is not None:
                continue
            try:
                self.work.add_peer(name, process.make(self.work.place(DENSE), self._files(name)))
            except PeerError as error:
                self.missing[name] = str(error)

    def open(self, ids: Tensor, logits: Tensor, threads: int) -> list[Contender]:
        """Have every model written, measured alone, and opened.

        Parameters
        ----------
        ids, logits : Tensor
            A prompt [1, tokens], and what the dense model says after it, [vocabulary] fp32.
        threads : int

        Returns
        -------
        list of Contender
            Those that take part; what does not is in `missing`.
        """
        self.make()
        for name, process in self._processes.items():
            sizes = self.work.peer(name)
            if name in self.missing or sizes is None:
                continue
            try:
                wanted = [mode for mode in sizes if not self.modes or mode in self.modes]
                rivals = [self._open(name, process, mode, sizes[mode], ids, logits, threads) for mode in wanted]
                errors = [r.contender.logits_error for r in rivals if r.contender.logits_error is not None]
                if errors and min(errors) > WRONG:
                    raise PeerError(f"the best of its logits are off by {min(errors):.2g} of the largest")
                self.found += rivals
            except PeerError as error:
                self.missing[name] = str(error)
        return [rival.contender for rival in self.found]

    def again(self, threads: int) -> None:
        """Load all of them anew for another number of threads."""
        for rival in self.found:
            rival.process.shut(rival.mode)
            rival.process.open(rival.mode, self._files(rival.process.name), threads)

    def _files(self, name: str) -> Path:
        return self.work.place(f"{name} files")

    def _open(
        self,
        name: str,
        process: ModelProcess,
        mode: str,
        nbytes: int,
        ids: Tensor,
        logits: Tensor,
        threads: int,
    ) -> Rival:
        one, into = Contender(f"{name} {mode}", "rival", mode, disk_bytes=nbytes), self._files(name)
        started = time.perf_counter()
        with ModelProcess(name) as alone:
            alone.version()
            imported, base = time.perf_counter() - started, alone.peak_bytes()
            load_s, one.memory_bytes = alone.open(mode, into, threads)
            alone.ready(mode, ids, False)
            first = alone.took(mode, "first")
            one.footprint = Footprint(imported, load_s, first, base, alone.peak_bytes())
        process.open(mode, into, threads)
        process.ready(mode, ids, False)
        process.took(mode, "first")
        one.logits_error = float((process.logits(mode) - logits).abs().max() / logits.abs().max())
        return Rival(one, process, mode)
