"""The answers to one request: several generations at once, as text, streamed or whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from fastapi import Request
from fastapi.sse import EventSourceResponse
from starlette.types import Receive, Scope, Send

from zeroskip.serve.engine import Busy, Engine, Failed, Generation
from zeroskip.serve.errors import ApiError
from zeroskip.serve.metrics import Metrics
from zeroskip.serve.protocol import Generates, Usage
from zeroskip.serve.text import Decoder, Stops

__all__ = ["Answer", "Answers", "Stream", "unless_gone"]

Result = TypeVar("Result")
LOOK_S = 0.25  # how often to look whether a client that waits is still there
RETRY_S = 2


class Answer:
    """One answer to one prompt."""

    def __init__(self, index: int, generation: Generation, tokenizer: Any, stops: Sequence[str]) -> None:
        self.index, self.generation = index, generation
        self.reason: str | None = None
        self._decoder, self._stops = Decoder(tokenizer, generation.prompt), Stops(stops)

    async def pieces(self, metrics: Metrics, asked_at: float) -> AsyncIterator[str]:
        """Yield the text as it comes; `reason` tells afterwards why it ended."""
        last: float | None = None
        async for tokens in self.generation:
            now = time.perf_counter()
            if last is None:
                metrics.first_token.observe(now - asked_at)
            else:
                metrics.each_token.observe((now - last) / len(tokens))
            last = now
            metrics.generated_tokens.inc(len(tokens))
            piece = self._stops.add(self._decoder.add(tokens))
            if piece:
                yield piece
            if self._stops.hit:
                break
        if not self._stops.hit:
            rest = self._stops.add(self._decoder.finish()) + self._stops.finish()
            if rest:
                yield rest
        self.generation.close()
        self.reason = "stop" if self._stops.hit or self.generation.ended else "length"


class Answers:
    """All answers to one request.

    Parameters
    ----------
    prompts : list of list of int
        Each is answered `asked.n` times.
    most : int or None
        Tokens of an answer; None: what the context leaves.

    Raises
    ------
    ApiError
        400 for a prompt that does not fit, 429 if the queue is full, 503 if the engine has stopped.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        metrics: Metrics,
        asked: Generates,
        prompts: Sequence[list[int]],
        most: int | None,
    ) -> None:
        self._metrics, self._at = metrics, time.perf_counter()
        self.all: list[Answer] = []
        self.prompt_tokens = sum(len(prompt) for prompt in prompts)
        copies = asked.n or 1
        if len(prompts) * copies > engine.limit:
            raise ApiError(
                400, f"{len(prompts) * copies} answers asked for, at most {engine.limit} are served", param="n"
            )
        lengths = [room_for(engine, prompt, most, asked.FIELD) for prompt in prompts]
        try:
            for prompt, length in zip(prompts, lengths, strict=True):
                for _ in range(copies):
                    index = len(self.all)
                    generation = engine.open(prompt, length, asked.sampling(index))
                    self.all.append(Answer(index, generation, tokenizer, asked.stops))
        except Busy as busy:
            self.close()
            raise ApiError(429, f"the queue is full ({busy}); come again", "queue_full", retry_after=RETRY_S) from None
        except Failed as failed:
            self.close()
            raise ApiError(503, str(failed), retry_after=RETRY_S) from None
        metrics.prompt_tokens.inc(self.prompt_tokens)

    @property
    def usage(self) -> Usage:
        return Usage.of(self.prompt_tokens, sum(len(answer.generation.tokens) for answer in self.all))

    async def pieces(self) -> AsyncIterator[tuple[Answer, str | None]]:
        """Yield (answer, text) as it comes from any of them, and (answer, None) when one has ended."""
        arrived: asyncio.Queue[tuple[Answer, str | Exception | None]] = asyncio.Queue()

        async def follow(answer: Answer) -> None:
            try:
                async for piece in answer.pieces(self._metrics, self._at):
                    arrived.put_nowait((answer, piece))
                arrived.put_nowait((answer, None))
            except Exception as error:  # told to whoever consumes
                arrived.put_nowait((answer, error))

        followers = [asyncio.create_task(follow(answer)) for answer in self.all]
        try:
            for _ in self.all:
                while True:
                    answer, piece = await arrived.get()
                    if isinstance(piece, Exception):
                        raise piece
                    yield answer, piece
                    if piece is None:
                        break
        finally:
            for follower in followers:
                follower.cancel()

    async def texts(self) -> list[str]:
        """Return the whole answers."""
        texts = [""] * len(self.all)
        async for answer, piece in self.pieces():
            texts[answer.index] += piece or ""
        return texts

    def close(self) -> None:
        """Cancel what is not finished."""
        if any(not answer.generation.finished and answer.reason is None for answer in self.all):
            self._metrics.cancelled.inc()
        for answer in self.all:
            answer.generation.close()


def room_for(engine: Engine, prompt: list[int], most: int | None, param: str) -> int:
    """Return how many tokens may follow a prompt, which came in the field `param`.

    Raises
    ------
    ApiError
        If the prompt is empty, or does not fit into the context with that many.
    """
    if not prompt:
        raise ApiError(400, "the prompt holds no token: give some text", param=param)
    vocabulary = engine.vocabulary
    if max(prompt) >= vocabulary:
        raise ApiError(400, f"the prompt holds token {max(prompt)}; the model knows {vocabulary}", param=param)
    left = engine.context - len(prompt)
    if left < (most or 1):
        wanted = f"{len(prompt)} in the prompt" + (f" and {most} to follow" if most else "")
        raise ApiError(
            400,
            f"this server's maximum context length is {engine.context} tokens, but {wanted} were asked for",
            "context_length_exceeded",
            param,
        )
    return most or left


class Stream(EventSourceResponse):
    """A stream of events that calls `close` when it ends, also where the client left before it began."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Return the result of `work`; cancel it if the client leaves before."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=LOOK_S)
            if not task.done() and await request.is_disconnected():
                raise ApiError(499, "the client left")
    finally:
        task.cancel()
    return task.result()
