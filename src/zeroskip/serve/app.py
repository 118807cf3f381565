"""The application: the API's routes, the page, health and metrics, and the model that loads beside them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zeroskip.errors import ZeroskipError
from zeroskip.serve import errors
from zeroskip.serve.errors import ApiError, responses
from zeroskip.serve.metrics import Metrics
from zeroskip.serve.protocol import FORMS, now
from zeroskip.serve.room import Room
from zeroskip.serve.routes import router
from zeroskip.serve.settings import Settings

__all__ = ["create_app"]

LOOK_S = 1.0  # how often to look whether the engine runs


def create_app(
    settings: Settings,
    load: Callable[[Settings], Room] = Room.load,
    failed: Callable[[Exception], None] = lambda error: None,
    loaded: Callable[[Room], None] = lambda room: None,
) -> FastAPI:
    """Return the application; it loads its model when it starts, beside answering /health.

    Parameters
    ----------
    failed, loaded : function
        Called once the model could not be loaded, or is; `failed` also when its engine has stopped by itself.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async def load_it() -> None:
            try:
                app.state.room = await asyncio.to_thread(load, settings)
            except Exception as error:
                app.state.problem = error
                failed(error)
                return
            app.state.metrics.describe(app.state.room.model)
            if (engine := app.state.room.engine) is not None:
                app.state.metrics.watch(lambda: engine.running, lambda: engine.waiting)
            loaded(app.state.room)

        async def watch() -> None:
            await asyncio.wait([loading])  # awaited itself, it would be cancelled with this
            while (room := app.state.room) is not None and room.alive:
                await asyncio.sleep(LOOK_S)
            if app.state.problem is None:
                failed(ZeroskipError("the engine has stopped, see the log above: start the server again"))

        loading = asyncio.create_task(load_it())
        watching = asyncio.create_task(watch())
        yield
        watching.cancel()
        await loading
        if app.state.room is not None:
            await asyncio.to_thread(app.state.room.stop)

    app = FastAPI(title="zeroskip", summary="OpenAI-compatible API of one model.", lifespan=lifespan)
    app.state.settings, app.state.metrics, app.state.room, app.state.problem = settings, Metrics(), None, None
    app.state.since = now()
    errors.install(app, FORMS)
    app.include_router(router)
    app.add_middleware(Measured, metrics=app.state.metrics)
    app.get("/", include_in_schema=False)(_page)
    app.get("/health", responses=responses(503))(_health)
    app.get("/metrics", response_class=PlainTextResponse)(_metrics)
    app.openapi = partial(_described, app)  # type: ignore[method-assign]
    return app


def _described(app: FastAPI) -> dict[str, Any]:
    """Return FastAPI's description without its own form of invalid requests, which we answer with 400."""
    made = app.openapi_schema or FastAPI.openapi(app)
    for path in made["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
            if app.state.settings.api_key is None:
                operation.pop("security", None)
    for name in ("HTTPValidationError", "ValidationError"):
        made["components"]["schemas"].pop(name, None)
    return made


class Measured:
    """Counts and times requests, streams to their end."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), "none"

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, status).inc()
            self.metrics.whole.labels(route).observe(time.perf_counter() - started)


async def _page() -> HTMLResponse:
    return HTMLResponse(files("zeroskip.serve").joinpath("page.html").read_text(encoding="utf-8"))


async def _health(request: Request) -> Any:
    """Whether the model is loaded and can answer."""
    room: Room | None = request.app.state.room
    if room is None:
        problem = request.app.state.problem
        why = "the model is being loaded" if problem is None else f"the model cannot be loaded: {problem}"
        return ApiError(503, why, "loading", retry_after=1).response()
    if not room.alive:
        return ApiError(503, "the engine has stopped", "stopped").response()
    return {"status": "ok"}


async def _metrics(request: Request) -> PlainTextResponse:
    """Counters for Prometheus."""
    return PlainTextResponse(request.app.state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
