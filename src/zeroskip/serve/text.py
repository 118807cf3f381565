"""From tokens to text as they come: no half characters, and an end at a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["Decoder", "Stops"]

CONTEXT = 6  # tokens: more than a character has bytes


class Decoder:
    """Decode a growing list of tokens piece by piece.

    The text of a token depends on those before it (spaces, bytes of one character), so the last few are decoded again
    with each new one, and what does not yet end in a whole character is held back.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    context : sequence of int
        What came before, whose text is not given again.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(context[-CONTEXT:])
        # Tokens before `_start` are done with, those before `_read` are out.
        self._start, self._read = 0, len(self._tokens)

    def add(self, tokens: Iterable[int]) -> str:
        """Return the text that these tokens complete."""
        self._tokens.extend(tokens)
        before = self._decode(self._tokens[self._start : self._read])
        now = self._decode(self._tokens[self._start :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return now[len(before) :]

    def finish(self) -> str:
        """Return what was held back."""
        before = self._decode(self._tokens[self._start : self._read])
        return self._decode(self._tokens[self._start :])[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class Stops:
    """Let text through up to the first stop string; what may be the beginning of one waits."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.hit = False

    def add(self, text: str) -> str:
        """Return the text that can be shown; `hit` tells whether a stop string ended it."""
        if self.hit:
            return ""
        text = self._held + text
        places = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if places:
            self.hit, self._held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return what waited in vain."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
