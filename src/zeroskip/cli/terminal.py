"""What every command shares: how it is registered, how it fails, how it shows progress, where its result goes.

A bad input is one line on stderr and exit code 2, Ctrl-C one line and exit code 130; ZEROSKIP_DEBUG=1 lets the
exception through. Results go to stdout, progress to stderr, and where stderr is no terminal progress is plain lines.
Nothing here imports torch: `zeroskip --help` answers at once.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TypeVar

import typer

from zeroskip.cli.process import honour_cpu_limit
from zeroskip.errors import ZeroskipError
from zeroskip.startup import INTERRUPTED, leave

__all__ = ["Command", "Json", "app", "command", "interrupted", "main", "progress", "say", "step", "utf8", "write_json"]

Command = TypeVar("Command", bound=Callable[..., None])
Advance = Callable[[int, int, str], None]
Json = Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Write the result to PATH as JSON as well.")]

BAD_INPUT = 2
PLAIN_SECONDS = 5.0  # without a terminal, a line of progress at most this often

app = typer.Typer(
    name="zeroskip",
    help="Prune a model, pack it, measure it, and run it only where that is faster than dense.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    level = logging.INFO if os.environ.get("ZEROSKIP_DEBUG") else logging.ERROR
    logging.basicConfig(level=level, format="%(name)s: %(message)s")
    honour_cpu_limit()
    # The progress is ours: transformers' own bars and advice would stand between its lines.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")


def main() -> None:
    """Run the command line; a word or option that it does not know is one line too."""
    try:
        code = app(standalone_mode=False)
    except Exception as error:  # typer's own errors: their class has moved from one of its versions to the next
        say_it = getattr(error, "format_message", None)
        if say_it is None:
            raise
        place = getattr(getattr(error, "ctx", None), "command_path", "zeroskip")
        typer.echo(f"zeroskip: {' '.join(say_it().split())} ({place} --help tells more)", err=True)
        code = BAD_INPUT
    sys.exit(code)


def command(name: str, example: str, group: typer.Typer = app) -> Callable[[Command], Command]:
    """Register a function as a command whose errors are one line, and whose help ends with an example."""

    def register(function: Command) -> Command:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> None:
            path = kwargs.get("json_path")
            try:
                if path is not None:
                    _check_writable(path)
                with _interrupts_noted():
                    function(*args, **kwargs)
            except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes what is left when it ends
                raise typer.Exit(0) from None
            except BaseException as error:
                if interrupted(error):
                    hint = f" {error}" if isinstance(error, KeyboardInterrupt) else ""
                    _fail(f"interrupted{hint}", INTERRUPTED, error)
                if isinstance(error, ValueError | OSError):
                    _fail(str(error) or type(error).__name__, BAD_INPUT, error)
                raise

        group.command(name, epilog=f"Example: {example}")(guarded)
        return function

    return register


_noted = threading.Event()


@contextmanager
def _interrupts_noted() -> Iterator[None]:
    """Remember a Ctrl-C that was raised: extensions may turn it into an error of their own, without a trace of it."""
    _noted.clear()
    before = signal.getsignal(signal.SIGINT)
    ours = before in (signal.default_int_handler, leave)
    if threading.current_thread() is not threading.main_thread() or not ours:
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        _noted.set()
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def interrupted(error: BaseException | None) -> bool:
    """Return whether Ctrl-C is behind an error: cleaning up half-done work may raise an error of its own."""
    if _noted.is_set():
        return True
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


def _fail(message: str, code: int, error: BaseException) -> None:
    if os.environ.get("ZEROSKIP_DEBUG"):
        raise error
    typer.echo(f"zeroskip: {' '.join(message.split())}", err=True)
    raise typer.Exit(code) from None


def say(text: object = "", nl: bool = True) -> None:
    """Print a result, by default with the end of its line."""
    typer.echo(str(text), nl=nl)


def utf8(text: str, where: str) -> str:
    """Return the text, or raise: Python hands on bytes that are no UTF-8 as characters that no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ZeroskipError(f"{where}: is not UTF-8 (character {error.start + 1}): convert it first") from None
    return text


def _check_writable(path: Path) -> None:
    """Find out before the work, not after it, that its result cannot be written."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ZeroskipError(f"--json {path}: name a file in a directory that exists")


def write_json(path: Path | None, value: Any) -> None:
    """Write `value` to `path`, if one was given: whole or not at all."""
    if path is None:
        return
    beside = path.with_name(path.name + ".new")
    try:
        beside.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def progress(what: str) -> Iterator[Advance]:
    """Show how far a job is; yields advance(done, total, detail).

    A bar on a terminal; elsewhere one line at the start, one every few seconds, and one at the end.
    """
    if not sys.stderr.isatty():
        yield from _plain_progress(what)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[detail]}"), console=Console(stderr=True)) as bars:
        bar = bars.add_task(what, total=None, detail="")

        def advance(done: int, total: int, detail: str = "") -> None:
            bars.update(bar, completed=done, total=total, detail=detail)

        yield advance


def _plain_progress(what: str) -> Iterator[Advance]:
    started = said = time.monotonic()
    typer.echo(what, err=True)

    def advance(done: int, total: int, detail: str = "") -> None:
        nonlocal said
        if time.monotonic() - said >= PLAIN_SECONDS:
            said = time.monotonic()
            typer.echo(f"{what}: {said - started:.0f} s, {done} of {total} {detail}".rstrip(), err=True)

    yield advance
    typer.echo(f"{what}: done in {time.monotonic() - started:.1f} s", err=True)


@contextmanager
def step(what: str) -> Iterator[None]:
    """Show that a job of unknown length runs: a spinner on a terminal, else a line before and one after it."""
    with progress(what):
        yield
