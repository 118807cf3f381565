"""The command line: one command, one file; each is thin over a call of the library."""

from zeroskip.cli import analyze, bench, chat, compile, convert, demo, evaluate, info, prune, run, serve
from zeroskip.cli.terminal import app, main

__all__ = [
    "analyze", "app", "bench", "chat", "compile", "convert", "demo", "evaluate", "info", "main", "prune", "run",
    "serve",
]  # fmt: skip
