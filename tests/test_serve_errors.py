"""What a request may do to the others and to the server: nothing. And what it is told is about the field it sent."""

import threading

import pytest
from cli_models import write_endless
from serving import httpx, serving, wait_until

openai = pytest.importorskip("openai")

SENT_AS_FORM = "application/x-www-form-urlencoded"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "endless"
    write_endless(folder)
    with serving(folder, cache_mb=64) as made:
        yield made


@pytest.mark.parametrize("setting", [{"temperature": 1e-300}, {"temperature": 5e-324}, {"top_p": 1e-300}])
def test_the_least_setting_is_greedy_and_ends_nobody(setting, server):
    asked = {"model": "endless", "prompt": "a", "max_tokens": 5}
    greedy = server.post("/v1/completions", json=asked | {"temperature": 0}).json()["choices"]
    got = server.post("/v1/completions", json=asked | setting)
    assert got.status_code == 200 and got.json()["choices"] == greedy
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(
    ("path", "asked", "param", "said"),
    [
        ("completions", {"prompt": "a", "stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ("completions", {"prompt": [-1]}, "prompt", "token numbers"),
        ("completions", {"prompt": ["a", 5]}, "prompt", "token numbers"),
        ("completions", {"prompt": "a " * 3000}, "prompt", "3000"),
        ("completions", {}, "prompt", "required"),
        ("embeddings", {"input": None}, "input", "a text"),
        ("chat/completions", {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "list of parts"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a " * 3000}]}, "messages", "3000"),
        ("chat/completions", {"messages": [{"role": "user", "content": ""}]}, "messages", "no token"),
    ],
)
def test_errors_name_the_field(path, asked, param, said, server):
    error = server.post(f"/v1/{path}", json={"model": "endless"} | asked).json()["error"]
    assert error["param"] == param and said in error["message"]


@pytest.mark.parametrize("kind", ["text/plain", SENT_AS_FORM, None])
def test_a_body_that_is_sent_as_something_else(kind, server):
    headers = {} if kind is None else {"Content-Type": kind}
    error = server.post("/v1/completions", content=b'{"model":"endless","prompt":"a"}', headers=headers).json()["error"]
    assert "Content-Type: application/json" in error["message"] and (kind or "nothing") in error["message"]


def test_a_server_that_is_stopped_while_it_loads_ends(tmp_path):
    from zeroskip.serve.room import Room

    write_endless(tmp_path / "endless")
    go, made = threading.Event(), []

    def slowly(settings):
        go.wait(60)
        made.append(Room.load(settings))
        return made[0]

    with serving(tmp_path / "endless", wait=False, load=slowly, cache_mb=16):
        threading.Timer(0.5, go.set).start()
    assert not made[0].alive


def test_a_server_whose_engine_has_stopped_ends(tmp_path):
    write_endless(tmp_path / "endless")
    told = []
    with serving(tmp_path / "endless", cache_mb=16, failed=told.append) as made:
        made.room.engine._manager.stop(block=True, hard_stop=True)
        wait_until(lambda: told, "the server is told")
        assert "engine has stopped" in str(told[0])


ERRORS = {
    "unknown model": ({"model": "gpt-9", "prompt": "a"}, openai.NotFoundError, "model_not_found", "gpt-9"),
    "oversized prompt": ({"prompt": "a " * 3000}, openai.BadRequestError, "context_length_exceeded", "3000"),
    "oversized answer": (
        {"prompt": "a", "max_tokens": 3000},
        openai.BadRequestError,
        "context_length_exceeded",
        "3000",
    ),
    "no prompt": ({"prompt": ""}, openai.BadRequestError, None, "no token"),
    "no prompts": ({"prompt": []}, openai.BadRequestError, None, "empty list"),
    "unknown token": ({"prompt": [70000]}, openai.BadRequestError, None, "70000"),
    "temperature": ({"prompt": "a", "temperature": 3}, openai.BadRequestError, None, "temperature"),
    "not served": ({"prompt": "a", "logprobs": 3}, openai.BadRequestError, "unsupported_parameter", "logprobs"),
    "tokens' chances": ({"prompt": "a", "logprobs": 1}, openai.BadRequestError, "unsupported_parameter", "logprobs"),
    "the prompt again": ({"prompt": "a", "echo": True}, openai.BadRequestError, "unsupported_parameter", "echo"),
    "too many": ({"prompt": ["a"] * 60, "n": 16}, openai.BadRequestError, None, "960"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_openais(case, server):
    asked, kind, code, said = ERRORS[case]
    with pytest.raises(kind) as caught:
        server.client().completions.create(**{"model": "endless", "temperature": 0} | asked)
    error = caught.value
    assert error.code == code and said in error.body["message"] and error.body["type"]


@pytest.mark.parametrize("path", ["completions", "chat/completions", "embeddings"])
def test_bad_json_and_wrong_kinds(path, server):
    for body in (b"{", b"[]", b"", b"\xff", b'{"model": 5}'):
        answer = server.post(f"/v1/{path}", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error", body
