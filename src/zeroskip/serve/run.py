"""Listen until told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from zeroskip.errors import ZeroskipError
from zeroskip.serve.app import create_app
from zeroskip.serve.room import Room
from zeroskip.serve.settings import Settings

__all__ = ["listen", "serve"]


def serve(settings: Settings, listening: Callable[[str], None], loaded: Callable[[Room], None]) -> None:
    """Serve until SIGINT or SIGTERM; requests that are running are then finished, a second SIGINT ends them.

    Parameters
    ----------
    listening : function
        Told the address as soon as it answers, before the model is loaded.
    loaded : function
        Told what is served, once it is.

    Raises
    ------
    ZeroskipError
        If the address is taken or the model cannot be loaded.
    """
    problems: list[Exception] = []
    rooms: list[Room] = []

    def failed(error: Exception) -> None:
        problems.append(error)
        server.should_exit = True

    def ready(room: Room) -> None:
        rooms.append(room)
        loaded(room)

    with listen(settings.host, settings.port) as bound:
        app = create_app(settings, failed=failed, loaded=ready)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        logging.getLogger("uvicorn.error").addFilter(_unless_cancelled)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        listening(f"http://{host}:{bound.getsockname()[1]}")
        try:
            with _signals_end_quietly():
                server.run(sockets=[bound])
        finally:
            for room in rooms:
                room.stop(hard=True)  # nothing runs any more, unless it was told twice
    if problems:
        raise problems[0]


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises
    ------
    ZeroskipError
        Naming the address and why it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        why = error.strerror or error
        raise ZeroskipError(f"cannot listen on {host}:{port}: {why}; choose another --port or --host") from None


def _unless_cancelled(record: logging.LogRecord) -> bool:
    """Leave out that the second SIGINT ended a request, or the wait for them, which is what it is for."""
    told = record.getMessage() if record.exc_info is None else type(record.exc_info[1]).__name__
    return not told.rstrip().endswith(asyncio.CancelledError.__name__)


@contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """Let the signals that uvicorn raises again once it has stopped do nothing: the stop was what was wanted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
