"""Text from a causal language model, shown as it comes: what `run --prompt` and `chat` share."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from zeroskip.errors import ZeroskipError

__all__ = ["Drawing", "Spoken", "generate"]


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn: `temperature` 0 is greedy, `seed` None draws another text each time."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 10:
            raise ZeroskipError(f"--temperature {self.temperature}: give 0 (greedy) to 10")
        if not 0 < self.top_p <= 1:
            raise ZeroskipError(f"--top-p {self.top_p}: give more than 0 and at most 1")

    def options(self) -> dict[str, Any]:
        """Return the arguments of transformers' `generate`."""
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        from zeroskip.serve.sampling import LEAST_TEMPERATURE

        temperature = max(self.temperature, LEAST_TEMPERATURE)
        return {"do_sample": True, "temperature": temperature, "top_p": self.top_p, "top_k": 0}


@dataclass
class Spoken:
    """What was generated, and how fast.

    Attributes
    ----------
    text : str
    new_tokens : int
    first_token_s : float
        From the call to the first token.
    seconds : float
        All of it.
    stopped : bool
        Whether Ctrl-C ended it.
    """

    text: str
    new_tokens: int
    first_token_s: float
    seconds: float
    stopped: bool = False

    @property
    def tokens_a_second(self) -> float:
        """After the first token; 0 where there is only one."""
        return (self.new_tokens - 1) / (self.seconds - self.first_token_s) if self.new_tokens > 1 else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_a_second": self.tokens_a_second}

    def __str__(self) -> str:
        rate = f", then {self.tokens_a_second:.1f} a second" if self.new_tokens > 1 else ""
        return f"{self.new_tokens} tokens: the first after {self.first_token_s:.2f} s{rate}"


def generate(network: Any, tokenizer: Any, tokens: list[int], drawing: Drawing, show: Callable[[str], None]) -> Spoken:
    """Continue `tokens`, giving the text to `show` piece by piece; Ctrl-C ends it and keeps what is there.

    Raises
    ------
    ZeroskipError
        If there is no token to continue, one that the model does not know, or more than it has positions for.
    """
    import torch
    from transformers import set_seed
    from transformers.generation.streamers import BaseStreamer

    from zeroskip.serve.text import Decoder

    if not tokens:
        raise ZeroskipError("the prompt holds no token: give --prompt TEXT")
    words = int(network.config.get_text_config().vocab_size)
    if max(tokens) >= words:
        raise ZeroskipError(
            f"the prompt holds token {max(tokens)}, and the model knows {words}: its tokenizer is another's"
        )
    known = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    room = drawing.max_new_tokens if known is None else min(drawing.max_new_tokens, int(known) - len(tokens))
    if room < 1:
        raise ZeroskipError(f"the prompt has {len(tokens)} tokens, and the model knows {known} positions: shorten it")

    class Shown(BaseStreamer):  # type: ignore[misc]
        """Takes the prompt first, then token by token."""

        def __init__(self) -> None:
            self.decoder, self.made, self.text, self.first = Decoder(tokenizer, tokens), -len(tokens), "", 0.0

        def put(self, value: Any) -> None:
            self.made += value.numel()
            if self.made <= 0:
                return
            self.first = self.first or time.perf_counter() - started
            self.out(self.decoder.add(value.flatten().tolist()))

        def end(self) -> None:
            self.out(self.decoder.finish())

        def out(self, piece: str) -> None:
            self.text += piece
            if piece:
                show(piece)

    if drawing.seed is not None:
        set_seed(drawing.seed)
    ids = torch.tensor([tokens])
    started = time.perf_counter()
    streamer, stopped = Shown(), False
    asked = threading.Event()

    def stop(made: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
        return torch.full((len(made),), asked.is_set())

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    try:
        with torch.inference_mode(), _interrupt_sets(asked):
            network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                streamer=streamer,
                pad_token_id=pad,
                stopping_criteria=[stop],
                **drawing.options(),
            )
        stopped = asked.is_set()
    except KeyboardInterrupt:
        streamer.end()
        stopped = True
    seconds = time.perf_counter() - started
    return Spoken(streamer.text, max(streamer.made, 0), streamer.first, seconds, stopped)


@contextmanager
def _interrupt_sets(asked: threading.Event) -> Iterator[None]:
    """Let the first Ctrl-C set the event and the next one raise: raised inside a callback it could get lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.getsignal(signal.SIGINT)

    def note(*_: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, old)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)
