"""What a benchmark of whole language models is asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from zeroskip.bench import peers
from zeroskip.bench.llm_models import SHAPES
from zeroskip.errors import ZeroskipError, expect_seconds, suggest
from zeroskip.planning.plan import check_prefer
from zeroskip.prune import Recipe
from zeroskip.prune.recipe import DEFAULTS

__all__ = ["DTYPES", "Settings"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """What to benchmark.

    Attributes
    ----------
    model : Path or None
        A Hugging Face directory of a dense causal language model.
    shape : str
        Instead of `model`: random weights of one of `SHAPES`, with `layers` blocks where given.
    recipes : tuple of str
        Names or files of recipes.
    tokens, batch : tuple of int
        Of prompts; sequences that are decoded together.
    threads : tuple of int
        Of the races; models are compiled and measured alone with the first.
    dtype : "fp32" or "bf16"
        What ours compute in between their layers; torch's rivals take part in both.
    text, context
        As for `zeroskip.perplexity`; without text none is measured.
    calibration : Path or None
        Text for methods that need data; without it others stand for them: `without_data`.
    race_s : float
        Seconds of each race, once it has its least number of rounds.
    peers, modes : tuple of str
        Other libraries that are asked for, and which of their modes take part; all if none is named.
    dense : tuple of "fp32" and "bf16"
        In which of them the dense model races in torch.
    profile, compiled : bool
        Take a decode step of every model apart; also under torch.compile with a static cache.
    products : bool
        Race the linear layers alone, too; with the 4-bit products of peers that run no whole models.
    prefer : "speed" or "bytes"
        As for `zeroskip.compile`.
    embeddings, group_size : str or None, int or None
        "int8", "int4" or "none", and 32, 64 or 128, replace what the recipes say.
    make_only : bool
        Measure nothing: only prune, and have the peers' files written, for a later run in the same folder.
    """

    model: Path | None = None
    shape: str = ""
    layers: int | None = None
    recipes: tuple[str, ...] = ("none", "llm-int8-50", "llm-int4-50")
    tokens: tuple[int, ...] = (128, 1024)
    batch: tuple[int, ...] = (1, 4, 16)
    threads: tuple[int, ...] = (1,)
    dtype: str = "fp32"
    text: Path | None = None
    context: int | None = None
    calibration: Path | None = None
    race_s: float = 5.0
    peers: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    dense: tuple[str, ...] = ("fp32", "bf16")
    profile: bool = False
    compiled: bool = False
    products: bool = False
    prefer: str = "speed"
    embeddings: str | None = None
    group_size: int | None = None
    make_only: bool = False

    def __post_init__(self) -> None:
        if (self.model is None) == (not self.shape):
            raise ZeroskipError("give a model directory or a shape: one of them, not both")
        if self.shape and self.shape not in SHAPES:
            raise ZeroskipError(f"unknown shape {self.shape!r}{suggest(self.shape, SHAPES)}")
        if self.model is not None and not self.model.is_dir():
            raise ZeroskipError(f"{self.model}: no such model directory")
        if self.layers is not None and (not self.shape or self.layers < 1):
            raise ZeroskipError(f"layers is {self.layers}: give 1 or more, and only with a shape")
        if self.shape and (self.text is not None or self.calibration is not None):
            raise ZeroskipError(f"{self.shape} has random weights and no tokenizer: give a model, or no text")
        if self.dtype not in DTYPES:
            raise ZeroskipError(f"unknown dtype {self.dtype!r}{suggest(self.dtype, DTYPES)}")
        for name in self.dense:
            if name not in DTYPES:
                raise ZeroskipError(f"unknown dtype {name!r} of the dense model{suggest(name, DTYPES)}")
        known = [mode for name in self.peers if name in peers.names() for mode in peers.get(name).model_modes]
        for mode in self.modes:
            if mode not in known:
                raise ZeroskipError(f"unknown mode {mode!r} of the peers{suggest(mode, known)}")
        names = [Path(recipe).name for recipe in self.recipes]
        if not names or len(names) > len(set(names)):
            raise ZeroskipError(f"recipes {', '.join(names) or 'are none'}: give each once, and at least one")
        for recipe in self.recipes:
            Recipe.read(self.arguments, recipe)
        check_prefer(self.prefer)
        for what, counts in {"tokens": self.tokens, "batch": self.batch, "threads": self.threads}.items():
            if not counts or min(counts) < 1:
                raise ZeroskipError(f"{what} {counts}: give numbers of at least 1")
        expect_seconds("race_s", self.race_s)
        for name in self.peers:
            if name not in peers.names():
                raise ZeroskipError(f"unknown peer {name!r}{suggest(name, peers.names())}")

    @property
    def replaced(self) -> dict[str, Any]:
        """The arguments of `prune` beside a recipe that are given."""
        given = {"embeddings": self.embeddings, "group_size": self.group_size}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments of `prune` beside a recipe, as `Recipe.read` takes them."""
        return DEFAULTS | self.replaced

    @property
    def models(self) -> dict[str, Any]:
        """What decides on the dense and pruned models, as plain data."""
        given = {"model": self.model, "calibration": self.calibration}
        paths = {name: None if path is None else str(path.resolve()) for name, path in given.items()}
        return paths | {"shape": self.shape, "layers": self.layers, "dtype": self.dtype}

    def to_dict(self) -> dict[str, Any]:
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
