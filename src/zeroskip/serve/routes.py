"""The routes under /v1, as OpenAI has them."""

from __future__ import annotations

import asyncio
import base64
import hmac
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from zeroskip.errors import ZeroskipError, suggest
from zeroskip.serve.answers import Answers
from zeroskip.serve.embed import TooLong
from zeroskip.serve.engine import Engine
from zeroskip.serve.errors import ApiError, responses
from zeroskip.serve.forms import Chat, Completion, answered
from zeroskip.serve.prompts import chat_tokens
from zeroskip.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    ModelCard,
    ModelList,
    Usage,
    refuse_unserved,
)
from zeroskip.serve.room import Room

__all__ = ["router"]

DEFAULT_COMPLETION = 16  # tokens, as OpenAI has it
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "Whole or, with stream, events.", "content": {"text/event-stream": {}}}
}
bearer = HTTPBearer(auto_error=False, description="Needed where the server was started with --api-key-env.")
router = APIRouter(prefix="/v1")


async def allowed(
    request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)] = None
) -> None:
    """Raise unless the client has the key, where one is needed."""
    key = request.app.state.settings.api_key
    if key is not None and not hmac.compare_digest((given.credentials if given else "").encode(), key.encode()):
        said = "a wrong key" if given else "no key"
        raise ApiError(401, f"{said} was sent; send it as Authorization: Bearer KEY", "invalid_api_key")


async def ready(request: Request, _: Annotated[None, Depends(allowed)]) -> Room:
    """Return what is served, or raise as long as it is loading."""
    room: Room | None = request.app.state.room
    if room is None:
        raise ApiError(503, "the model is being loaded", "loading", retry_after=1)
    return room


Ready = Annotated[Room, Depends(ready)]


def _check_model(request: Request, name: str) -> None:
    own = request.app.state.settings.name
    if name != own:
        raise ApiError(404, f"no model {name!r}{suggest(name, [own])}", "model_not_found", "model")


def _engine(room: Room) -> Engine:
    if room.engine is None:
        raise ApiError(400, "this model is an encoder: use /v1/embeddings", "unsupported_model", "model")
    return room.engine


@router.get("/models", responses=responses(401), dependencies=[Depends(allowed)])
async def models(request: Request) -> ModelList:
    """The one model."""
    return ModelList(data=[ModelCard(id=request.app.state.settings.name, created=request.app.state.since)])


@router.get("/models/{model:path}", responses=responses(401, 404), dependencies=[Depends(allowed)])
async def model(request: Request, model: str) -> ModelCard:
    """A model by its name."""
    _check_model(request, model)
    return ModelCard(id=model, created=request.app.state.since)


@router.post("/chat/completions", responses=STREAM | responses(400, 401, 404, 429, 500, 503), response_model=None)
async def chat(request: Request, asked: ChatRequest, room: Ready) -> Response:
    """Answer a conversation."""
    _check_model(request, asked.model)
    engine = _engine(room)
    refuse_unserved(asked)
    messages = [message.plain() for message in asked.messages]
    try:
        prompt = await asyncio.to_thread(chat_tokens, room.tokenizer, messages)
    except ZeroskipError as error:
        raise ApiError(400, str(error), param="messages") from None
    most = asked.max_completion_tokens or asked.max_tokens
    answers = Answers(engine, room.tokenizer, request.app.state.metrics, asked, [prompt], most)
    return await answered(request, asked, answers, "chatcmpl", Chat)


@router.post("/completions", responses=STREAM | responses(400, 401, 404, 429, 500, 503), response_model=None)
async def completions(request: Request, asked: CompletionRequest, room: Ready) -> Response:
    """Continue a text."""
    _check_model(request, asked.model)
    engine = _engine(room)
    refuse_unserved(asked)

    def tokens() -> list[list[int]]:
        return [list(p) if not isinstance(p, str) else room.tokenizer(p)["input_ids"] for p in asked.prompts]

    prompts = await asyncio.to_thread(tokens)
    if not prompts:
        raise ApiError(400, "prompt is an empty list: give some text", param="prompt")
    most = asked.max_tokens or DEFAULT_COMPLETION
    answers = Answers(engine, room.tokenizer, request.app.state.metrics, asked, prompts, most)
    return await answered(request, asked, answers, "cmpl", Completion)


@router.post("/embeddings", responses=responses(400, 401, 404, 429, 503), response_model=None)
async def embeddings(request: Request, asked: EmbeddingRequest, room: Ready) -> Response:
    """Turn texts into vectors of length one."""
    _check_model(request, asked.model)
    embedder = room.embedder
    if embedder is None:
        raise ApiError(400, "this model generates text and embeds none", "unsupported_model", "model")
    if asked.dimensions is not None:
        raise ApiError(400, "dimensions is not served here: leave it out", "unsupported_parameter", "dimensions")
    if not asked.texts or any(not text for text in asked.texts):
        raise ApiError(400, "input is empty: give some text", param="input")
    try:
        rows = await asyncio.to_thread(embedder.tokens, asked.texts)
    except TooLong as error:
        raise ApiError(400, str(error), "context_length_exceeded", "input") from None
    top = max(max(row) for row in rows)
    vocabulary = int(room.model.config.get_text_config().vocab_size)
    if top >= vocabulary:
        raise ApiError(400, f"input holds token {top}; the model knows {vocabulary}", param="input")
    if embedder.waiting > request.app.state.settings.max_queue:
        raise ApiError(429, f"the queue is full ({embedder.waiting} wait); come again", "queue_full", retry_after=1)
    embedder.waiting += 1
    try:
        vectors = await asyncio.to_thread(embedder, rows)
    finally:
        embedder.waiting -= 1
    count = sum(len(row) for row in rows)
    request.app.state.metrics.prompt_tokens.inc(count)
    data = []
    for index, vector in enumerate(vectors):
        raw = vector.tolist()
        value: Any = base64.b64encode(vector.numpy().tobytes()).decode() if asked.encoding_format == "base64" else raw
        data.append({"object": "embedding", "index": index, "embedding": value})
    usage = Usage.of(count).model_dump(include={"prompt_tokens", "total_tokens"})
    return JSONResponse({"object": "list", "data": data, "model": asked.model, "usage": usage})
