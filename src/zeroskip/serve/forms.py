"""How answers are written: whole or in events, to a conversation or to a text."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import format_sse_event

from zeroskip.serve import errors
from zeroskip.serve.answers import Answer, Answers, Stream, unless_gone
from zeroskip.serve.engine import Failed
from zeroskip.serve.errors import ApiError
from zeroskip.serve.protocol import Generates, now

__all__ = ["Chat", "Completion", "answered"]


class Chat:
    """How a conversation is answered."""

    whole, piece = "chat.completion", "chat.completion.chunk"
    first: dict[str, Any] | None = {"delta": {"role": "assistant", "content": ""}}  # noqa: RUF012

    @staticmethod
    def choice(text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    @staticmethod
    def delta(text: str | None) -> dict[str, Any]:
        return {"delta": {} if text is None else {"content": text}}


class Completion:
    """How a text is continued."""

    whole = piece = "text_completion"
    first: dict[str, Any] | None = None

    @staticmethod
    def choice(text: str) -> dict[str, Any]:
        return {"text": text}

    @staticmethod
    def delta(text: str | None) -> dict[str, Any]:
        return {"text": text or ""}


Form = type[Chat] | type[Completion]


async def answered(request: Request, asked: Generates, answers: Answers, prefix: str, form: Form) -> Response:
    head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": now(), "model": asked.model}
    if asked.stream:
        return Stream(_events(asked, answers, head | {"object": form.piece}, form), answers.close)
    try:
        texts = await unless_gone(request, answers.texts())
    except Failed as failed:
        raise ApiError(500, str(failed)) from None
    finally:
        answers.close()
    choices = [_choice(answer, form.choice(texts[answer.index]), answer.reason) for answer in answers.all]
    return JSONResponse(head | {"object": form.whole, "choices": choices, "usage": answers.usage.model_dump()})


def _choice(answer: Answer, content: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"index": answer.index, **content, "logprobs": None, "finish_reason": reason}


async def _events(asked: Generates, answers: Answers, head: dict[str, Any], form: Form) -> AsyncIterator[bytes]:
    def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
        if asked.with_usage:
            more = {"usage": None} | more
        return format_sse_event(data_str=json.dumps(head | {"choices": choices} | more, ensure_ascii=False))

    try:
        if form.first is not None:
            for answer in answers.all:
                yield event([_choice(answer, form.first)])
        async for answer, piece in answers.pieces():
            yield event([_choice(answer, form.delta(piece), answer.reason if piece is None else None)])
    except Failed as failed:
        yield format_sse_event(data_str=json.dumps(errors.body_of(500, str(failed))))
        return
    if asked.with_usage:
        yield event([], usage=answers.usage.model_dump())
    yield format_sse_event(data_str="[DONE]")
