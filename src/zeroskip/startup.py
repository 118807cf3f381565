"""The first seconds of the command line, while torch is imported: Ctrl-C is one line from the start.

Imported before torch, so it imports nothing that is slow. `cli/terminal.py` takes over while a command runs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

__all__ = ["INTERRUPTED", "is_command_line", "leave", "mind_interrupts"]

INTERRUPTED = 130  # what a shell reports for a process that Ctrl-C ended


def is_command_line() -> bool:
    """Whether this process was started as `zeroskip ...` or `python -m zeroskip ...`."""
    words = sys.orig_argv
    return os.path.basename(sys.argv[0]) == "zeroskip" or ("-m" in words and words[words.index("-m") + 1] == "zeroskip")


def mind_interrupts() -> None:
    """Answer Ctrl-C with one line in the command line's own process; elsewhere it is the caller's."""
    main = threading.current_thread() is threading.main_thread()
    if is_command_line() and main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)


def leave(number: int, frame: FrameType | None) -> None:
    """End the process at once: outside a command there is nothing to keep or to clean up."""
    os.write(2, b"zeroskip: interrupted\n")
    os._exit(INTERRUPTED)
