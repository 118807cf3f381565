"""The process of one peer: `python -I worker.py NAME`, run by the Python of the peer's environment.

It reads one JSON object a line from stdin and answers each with one on stdout. Arrays travel as .npy files.

{"do": "hello"}                                         -> {"version": "1.2.3"}
{"do": "load", "mode", "weight": path, "copies",
 "threads", "tokens", "stands": path}                   -> {"nbytes", "rounded": bool}; the weight that it stands
                                                           for is at `stands` if rounded
{"do": "check", "mode", "x": path, "y": path}           -> {"copies"}; the result of the last copy is at `y`
{"do": "time", "mode"}                                  -> {"seconds": of one multiplication with the x last checked}
{"do": "forget"}                                        -> {}; the weights of all modes are dropped

Whole language models, of a peer that has `model_modes`:
{"do": "make", "folder": path, "into": path}            -> {"bytes": {mode: of its file}}
{"do": "open", "mode", "into", "threads"}               -> {"seconds", "nbytes": of the weights}
{"do": "ready", "mode", "ids": path, "decode": bool}    -> {}; the prompts [batch, tokens] that follow are about; with
                                                           `decode` they are read
{"do": "first", "mode"}, {"do": "step", "mode"}         -> {"seconds"}; of a first token, of one more for each prompt
{"do": "logits", "mode", "y": path}                     -> {}; those of the last token that was run are at `y`
{"do": "losses", "mode", "ids": path}                   -> {"nll", "tokens"}
{"do": "shut", "mode"}                                  -> {}
{"do": "memory"}                                        -> {"peak_bytes": the most that was resident, or null}

An answer {"error": line} says that it could not. The end of stdin ends the process.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
LEAST_SAMPLE_S = 200e-6


def load_peer(name: str) -> Any:
    """Return the peer, its file read without the packages around it (they would import torch)."""
    package = "zeroskip.bench.peers"
    parts = package.split(".")
    for depth in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:depth]))
        module.__path__ = [str(HERE.parents[len(parts) - depth - 1]) if depth < len(parts) else str(HERE)]
        sys.modules[module.__name__] = module
    importlib.import_module(f"{package}.{name}")
    return importlib.import_module(f"{package}.base").get(name)()


class Session:
    """One peer with the weight that it has loaded last, in each mode."""

    def __init__(self, peer: Any) -> None:
        self.peer = peer
        self.works: dict[str, Any] = {}
        self.x: dict[str, Any] = {}
        self.models: dict[str, Any] = {}

    def hello(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"version": self.peer.version()}

    def load(self, asked: dict[str, Any]) -> dict[str, Any]:
        mode = asked["mode"]
        self.works.pop(mode, None)
        gc.collect()
        work = self.peer.load(mode, np.load(asked["weight"]), asked["copies"], asked["threads"], asked["tokens"])
        rounded = work.stands is not None
        if rounded:
            np.save(asked["stands"], work.stands)
        work.stands, self.works[mode] = None, work
        return {"nbytes": work.nbytes, "rounded": rounded}

    def check(self, asked: dict[str, Any]) -> dict[str, Any]:
        work = self.works[asked["mode"]]
        x = self.x[asked["mode"]] = np.load(asked["x"])
        np.save(asked["y"], np.asarray(work.run(x)[-1]))
        return {"copies": work.copies}

    def time(self, asked: dict[str, Any]) -> dict[str, Any]:
        """One run over all copies; several where that is too short for the clock."""
        work, x, runs = self.works[asked["mode"]], self.x[asked["mode"]], 0
        start = time.perf_counter()
        while True:
            work.run(x)
            runs += 1
            spent = time.perf_counter() - start
            if spent >= LEAST_SAMPLE_S:
                return {"seconds": spent / (runs * work.copies)}

    def forget(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.works.clear()
        gc.collect()
        return {}

    def make(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"bytes": self.peer.make_models(Path(asked["folder"]), Path(asked["into"]))}

    def open(self, asked: dict[str, Any]) -> dict[str, Any]:
        model = self.models[asked["mode"]] = self.peer.open_model(asked["mode"], Path(asked["into"]), asked["threads"])
        return {"seconds": model.load_s, "nbytes": model.nbytes}

    def ready(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.models[asked["mode"]].ready(np.load(asked["ids"]), asked["decode"])
        return {}

    def first(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"seconds": self.models[asked["mode"]].first()}

    def step(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"seconds": self.models[asked["mode"]].step()}

    def logits(self, asked: dict[str, Any]) -> dict[str, Any]:
        np.save(asked["y"], self.models[asked["mode"]].logits(-1))
        return {}

    def losses(self, asked: dict[str, Any]) -> dict[str, Any]:
        nll, tokens = self.models[asked["mode"]].losses(np.load(asked["ids"]))
        return {"nll": nll, "tokens": tokens}

    def shut(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.models.pop(asked["mode"]).close()
        return {}

    def memory(self, asked: dict[str, Any]) -> dict[str, Any]:
        lines = Path("/proc/self/status")
        if lines.exists():
            for line in lines.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return {"peak_bytes": int(line.split()[1]) * 1024}
        return {"peak_bytes": None}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints must not stand between the answers
    session = Session(load_peer(sys.argv[1]))
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = getattr(session, asked["do"])(asked)
        except Exception as error:
            text = str(error).strip().splitlines()
            answer = {"error": f"{type(error).__name__}: {text[0]}" if text else type(error).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
