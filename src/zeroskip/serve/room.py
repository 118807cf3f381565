"""What a server serves: a model with its tokenizer, loaded, and the engine or the encoder around it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from zeroskip.errors import ZeroskipError, first_line
from zeroskip.serve.embed import Embedder
from zeroskip.serve.engine import Engine
from zeroskip.serve.settings import Settings

__all__ = ["Room"]

log = logging.getLogger(__name__)


@dataclass
class Room:
    """One loaded model; `engine` is there for a language model, `embedder` for an encoder."""

    model: Any
    tokenizer: Any
    engine: Engine | None = None
    embedder: Embedder | None = None

    @classmethod
    def load(cls, settings: Settings) -> Room:
        """Load the model of a directory and start what serves it.

        Raises
        ------
        ZeroskipError
            If it cannot be loaded, or is neither a causal language model nor an encoder.
        """
        from zeroskip.cli import models

        model: Any = models.load(str(settings.directory))
        tokenizer = models.load_tokenizer(str(settings.directory))
        if models.is_causal_lm(model):
            engine = Engine(model, settings)
            engine.start()
            log.info("%s: context %d, %s", settings.name, engine.context, engine.sizes)
            return cls(model, tokenizer, engine=engine)
        try:
            return cls(model, tokenizer, embedder=Embedder(model, tokenizer, settings.directory))
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
            if isinstance(error, ZeroskipError):
                raise
            kind = type(model).__name__
            raise ZeroskipError(
                f"{settings.directory}: a {kind} is neither a causal language model nor an encoder of text "
                f"({first_line(error)})"
            ) from error

    @property
    def alive(self) -> bool:
        """Whether it can answer."""
        return self.engine is None or self.engine.alive

    def stop(self, hard: bool = False) -> None:
        """End the engine's thread: after its requests, or at once."""
        if self.engine is not None:
            self.engine.stop(hard)
