"""A real server on a free port of this machine, in a thread, and a model that never ends its answer by itself."""

import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

for needed in ("fastapi", "uvicorn", "prometheus_client", "psutil", "openai"):
    pytest.importorskip(needed, reason=f"needs {needed}: pip install 'zeroskip[serve,test]'")

import httpx2 as httpx  # what openai's client itself speaks with  # noqa: E402
import uvicorn  # noqa: E402
from openai import OpenAI  # noqa: E402

from zeroskip.serve import Settings  # noqa: E402
from zeroskip.serve.app import create_app  # noqa: E402
from zeroskip.serve.run import listen  # noqa: E402


class Server:
    """A running server: its address, its application and clients of it."""

    def __init__(self, url, app, settings):
        self.url, self.app, self.settings = url, app, settings
        self.name = settings.name

    @property
    def room(self):
        return self.app.state.room

    def client(self, key="none"):
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def post(self, path, **options):
        return httpx.post(self.url + path, timeout=60, **options)

    def metric(self, name):
        """The value of a metric without labels, as /metrics shows it."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


@contextmanager
def serving(directory, wait=True, load=None, failed=None, **options):
    settings = Settings(Path(directory), port=0, **options)
    with listen(settings.host, 0) as bound:
        told = {name: given for name, given in (("load", load), ("failed", failed)) if given is not None}
        app = create_app(settings, **told)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        made = Server(f"http://127.0.0.1:{bound.getsockname()[1]}", app, settings)
        try:
            if wait:
                wait_until(lambda: app.state.problem or app.state.room, "the model is loaded")
                assert app.state.problem is None, app.state.problem
            yield made
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def wait_until(condition, what, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not in {seconds} s: {what}"
        time.sleep(0.01)
