"""A headless Chromium that a test drives through a pipe, in the DevTools protocol; it needs nothing else."""

import base64
import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
FLAGS = ("--headless=new", "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")
SECONDS = 60


class Page:
    """One page, as DevTools sees it."""

    def __init__(self, replies, commands):
        self.replies, self.commands, self.rest, self.number = replies, commands, b"", 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    session = None

    def call(self, method, **params):
        """Send a command and return its result; events in between are passed over."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                read = os.read(self.replies, 1 << 16)
                assert read, "Chromium has gone"
                self.rest += read
            one, _, self.rest = self.rest.partition(b"\0")
            reply = json.loads(one)
            if reply.get("id") == self.number:
                assert "error" not in reply, reply
                return reply["result"]

    def run(self, script):
        """Return what a script evaluates to."""
        told = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def until(self, script, what):
        """Wait until a script gives something true, and return that."""
        end = time.monotonic() + SECONDS
        while not (found := self.run(script)):
            assert time.monotonic() < end, (
                f"not in {SECONDS} s: {what}; the page says {self.run('document.body.innerText')}"
            )
            time.sleep(0.05)
        return found

    def screenshot(self, path):
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser(folder):
    """Yield an empty page of a Chromium with a profile in `folder`; skip the test where there is none."""
    program = os.environ.get("ZEROSKIP_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("needs Chromium: install it, or set ZEROSKIP_CHROMIUM to its path")
    theirs_in, commands = os.pipe()
    replies, theirs_out = os.pipe()

    def pipes():  # it reads commands from 3 and writes replies to 4
        read, write = os.dup(theirs_in), os.dup(theirs_out)
        os.dup2(read, 3)
        os.dup2(write, 4)

    flags = (*FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else []), f"--user-data-dir={folder}")
    silent = subprocess.DEVNULL
    process = subprocess.Popen([program, *flags], close_fds=False, preexec_fn=pipes, stdout=silent, stderr=silent)
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Page(replies, commands)
    finally:
        process.kill()
        process.wait()
        os.close(commands)
        os.close(replies)
