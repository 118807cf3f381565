"""The page at `/`, tried by a headless Chromium against a real server: asked, streamed, stopped, cleared, refused."""

import os
from pathlib import Path

import pytest
from browser import browser
from cli_models import write_endless
from serving import httpx, serving, wait_until

SEND = "document.getElementById('text').value = {text!r}; document.getElementById('form').requestSubmit()"
TURNS = "[...document.querySelectorAll('.turn')].map(turn => [turn.className, turn.textContent])"
IDLE = "!document.getElementById('send').disabled"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(write_endless(tmp_path_factory.mktemp("models") / "endless"), cache_mb=64, api_key="open") as running:
        yield running


def test_a_person_tries_the_model(server, tmp_path):
    with browser(tmp_path / "profile") as page:
        page.call("Emulation.setDeviceMetricsOverride", width=900, height=700, deviceScaleFactor=1, mobile=False)
        page.call("Page.navigate", url=server.url)
        page.until("document.readyState === 'complete' && /key/i.test(state.textContent)", "it asks for a key")
        page.run("key.value = 'open'; key.dispatchEvent(new Event('change'))")
        page.until("state.textContent === 'ready'", "the model is found")
        assert page.run("document.querySelector('h1').textContent") == "endless"

        page.run("most.value = 12")
        page.run(SEND.format(text="sort a list"))
        page.until(f"{TURNS}.length === 2 && {IDLE}", "the answer is whole")
        (asked, said), (answered, text) = page.run(TURNS)
        assert (asked, said, answered) == ("turn user", "sort a list", "turn assistant")
        messages = [{"role": "user", "content": "sort a list"}]
        more = {"model": "endless", "max_tokens": 12, "temperature": 0}
        whole = server.client("open").chat.completions.create(messages=messages, **more)
        assert text == whole.choices[0].message.content != ""
        assert "a second" in page.run("speed.textContent")

        page.run("mode.value = 'text'")
        page.run(SEND.format(text="<b>read</b> a file"))
        page.until(f"{TURNS}.length === 4 && {IDLE}", "the second answer is whole")
        assert page.run("document.querySelectorAll('.turn b').length") == 0, "what was typed is text, not markup"
        page.screenshot(shot := Path(os.environ.get("ZEROSKIP_SCREENSHOT", tmp_path / "page.png")))
        assert shot.read_bytes().startswith(b"\x89PNG") and shot.stat().st_size > 5000

        page.run("most.value = 1900")
        page.run(SEND.format(text="read"))
        page.until(f"{TURNS}.length === 6 && {TURNS}[5][1].length > 20", "an answer is streamed")
        assert not page.run(IDLE)
        page.run("document.getElementById('stop').click()")
        page.until(IDLE, "the answer is stopped")
        wait_until(lambda: server.metric("zeroskip_requests_running") == 0, "its place is free")
        page.run("document.getElementById('clear').click()")
        assert page.run(TURNS) == []

        page.run("most.value = 5000")
        page.run(SEND.format(text="read"))
        page.until("document.querySelector('.error') !== null", "the refusal is shown")
        assert "5000" in page.run("document.querySelector('.error').textContent")


def test_the_page_asks_for_nothing_from_elsewhere(server):
    answer = httpx.get(server.url)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert "http://" not in answer.text and "https://" not in answer.text and "src=" not in answer.text
