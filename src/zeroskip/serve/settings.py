"""What a server is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zeroskip.errors import ZeroskipError

__all__ = ["Settings"]

MOST_PORT = 65535


@dataclass(frozen=True)
class Settings:
    """The options of `zeroskip serve`.

    Attributes
    ----------
    directory : path
        The model and its tokenizer.
    host, port : str, int
        Where to listen; port 0 takes a free one.
    max_concurrency : int
        Requests that generate at the same time.
    max_queue : int
        Requests that may wait beyond those; one more is told to come again (429).
    max_context : int or None
        Tokens of a prompt and its answer together; None: what the model and the memory allow.
    cache_mb : int or None
        Memory for the keys and values of all requests; None: enough for all of them, at most a quarter of what is free.
    api_key : str or None
        What a client has to send, if anything.
    batch_invariant : bool
        Give each request the bits that it gets alone.
    """

    directory: Path
    host: str = "127.0.0.1"
    port: int = 8000
    max_concurrency: int = 16
    max_queue: int = 64
    max_context: int | None = None
    cache_mb: int | None = None
    api_key: str | None = None
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        least = {"max_concurrency": 1, "max_queue": 0, "port": 0, "max_context": 2, "cache_mb": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ZeroskipError(f"{name} is {value}: give at least {low}")
        if self.port > MOST_PORT:
            raise ZeroskipError(f"port is {self.port}: give at most {MOST_PORT}, or 0 for a free one")

    @property
    def name(self) -> str:
        """What clients call the model: the name of its directory."""
        return self.directory.resolve().name
