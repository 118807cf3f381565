"""The server, spoken to over loopback by OpenAI's own client."""

import base64
import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from cli_models import WORDS, refused, write_endless, zeroskip_process
from serving import httpx, serving, wait_until

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    return write_endless(tmp_path_factory.mktemp("models") / "endless")


@pytest.fixture(scope="module")
def server(endless):
    with serving(endless, max_concurrency=16, cache_mb=64) as running:
        yield running


def alone(directory, prompt, count):
    """What transformers generates greedily, as text."""
    import zeroskip as zs
    from zeroskip.cli import models

    model, tokenizer = zs.load(directory), models.load_tokenizer(str(directory))
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_completion_is_what_transformers_generates(server, endless):
    got = server.client().completions.create(model="endless", prompt="sort a list", max_tokens=12, temperature=0)
    assert got.choices[0].text.strip() == alone(endless, "sort a list", 12).strip()
    assert got.choices[0].finish_reason == "length"
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (3, 12, 15)


def test_stream_and_whole_answer_say_the_same(server):
    asked = {"model": "endless", "max_tokens": 15, "temperature": 0}
    messages = [{"role": "system", "content": "read"}, {"role": "user", "content": [{"type": "text", "text": "a key"}]}]
    whole = server.client().chat.completions.create(messages=messages, **asked)
    stream = server.client().chat.completions.create(
        messages=messages, stream=True, stream_options={"include_usage": True}, **asked
    )
    *chunks, last = stream
    assert chunks[0].choices[0].delta.role == "assistant" and len(chunks) > 10
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content != ""
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert last.choices == [] and last.usage.completion_tokens == whole.usage.completion_tokens == 15


def test_several_prompts_answers_and_tokens(server):
    create = server.client().completions.create
    got = create(model="endless", prompt=["a list", "the key"], n=2, max_tokens=4, temperature=0)
    texts = [choice.text for choice in got.choices]
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    ids = [WORDS.index("a") + 3, WORDS.index("list") + 3]
    assert create(model="endless", prompt=ids, max_tokens=4, temperature=0).choices[0].text == texts[0]
    chunks = create(model="endless", prompt=["a list", "the key"], max_tokens=4, temperature=0, stream=True)
    streamed = ["", ""]
    for chunk in chunks:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [texts[0], texts[2]]


def test_seed_temperature_and_stop(server):
    asked = {"model": "endless", "prompt": "open the file", "max_tokens": 20}
    create = server.client().completions.create
    one, again, other = (create(seed=seed, **asked).choices[0].text for seed in (5, 5, 6))
    assert one == again != other
    greedy = create(temperature=0, **asked).choices[0].text
    assert create(top_p=1e-6, **asked).choices[0].text == greedy
    assert create(extra_body={"top_k": 1}, **asked).choices[0].text == greedy
    word = greedy.split()[5]
    stopped = create(temperature=0, stop=[word], **asked)
    assert stopped.choices[0].text == greedy[: greedy.index(word)] and stopped.choices[0].finish_reason == "stop"
    assert create(temperature=0, frequency_penalty=2, presence_penalty=2, **asked).choices[0].text != greedy


def test_sixteen_clients_at_once_lose_no_token(server):
    prompts = [f"{WORDS[i]} {WORDS[2 * i]}" for i in range(16)]
    before = server.metric("zeroskip_generated_tokens_total")
    together = []

    def ask(prompt):
        stream = server.client().completions.create(
            model="endless", prompt=prompt, max_tokens=60, temperature=0, stream=True
        )
        words = "".join(chunk.choices[0].text for chunk in stream).split()
        together.append(server.room.engine.running)
        return len(words)

    with ThreadPoolExecutor(16) as pool:
        counts = list(pool.map(ask, prompts))
    assert max(together) > 4
    assert server.metric("zeroskip_generated_tokens_total") - before == 16 * 60
    # Special tokens have no text, so words may be fewer than tokens.
    assert all(30 < count <= 60 for count in counts)


def test_a_client_that_leaves_frees_its_place(server):
    before = server.metric("zeroskip_generated_tokens_total")
    stream = server.client().completions.create(
        model="endless", prompt="a", max_tokens=2000, temperature=0, stream=True
    )
    for _ in zip(range(3), stream, strict=False):
        pass
    assert server.metric("zeroskip_requests_running") == 1
    stream.close()
    wait_until(lambda: server.metric("zeroskip_requests_running") == 0, "its place is free")
    assert server.metric("zeroskip_generated_tokens_total") - before < 1900
    with pytest.raises(openai.APITimeoutError):  # without a stream the server has to look whether it is still there
        server.client().with_options(timeout=0.4).completions.create(model="endless", prompt="a", max_tokens=2000)
    wait_until(lambda: server.metric("zeroskip_requests_running") == 0, "its place is free")
    scheduler = server.room.engine._manager.batch_processor.scheduler
    wait_until(lambda: not scheduler.has_pending_requests(), "the scheduler has forgotten it")
    assert server.metric("zeroskip_cancelled_requests_total") >= 2


def test_other_routes_in_the_same_form(server):
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)):
        answer = httpx.request(method, server.url + path)
        assert answer.status_code == status and answer.json()["error"]["message"]
    with pytest.raises(openai.BadRequestError, match="generates text"):
        server.client().embeddings.create(model="endless", input="a")
    assert "<html" in httpx.get(server.url).text
    assert server.client().models.retrieve("endless").id == server.client().models.list().data[0].id == "endless"
    with pytest.raises(openai.BadRequestError, match="image_url"):
        image = {"type": "image_url", "image_url": {"url": "data:"}}
        server.client().chat.completions.create(model="endless", messages=[{"role": "user", "content": [image]}])


def test_key_and_full_queue(endless):
    with serving(endless, api_key="secret", max_concurrency=1, max_queue=1, cache_mb=16) as server:
        for key in ("wrong", "secret2", "secre"):
            with pytest.raises(openai.AuthenticationError) as caught:
                server.client(key).models.list()
            assert caught.value.code == "invalid_api_key"
        assert server.post("/v1/completions", json={}).status_code == 401  # before anything else is looked at
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert _status(server) == 200
        create = server.client("secret").completions.create
        asked = {"model": "endless", "prompt": "a", "max_tokens": 1000, "temperature": 0}
        streams = [create(stream=True, **asked) for _ in range(2)]
        next(iter(streams[0]))
        assert server.metric("zeroskip_requests_waiting") == 1
        with pytest.raises(openai.RateLimitError) as caught:
            create(**asked)
        assert int(caught.value.response.headers["Retry-After"]) >= 1 and caught.value.code == "queue_full"
        for stream in streams:
            stream.close()
        wait_until(lambda: server.metric("zeroskip_requests_running") == 0, "both are forgotten")
        assert create(**asked | {"max_tokens": 3}).usage.completion_tokens == 3


def test_health_tells_when_it_is_loaded(endless):
    from zeroskip.serve.room import Room

    go = threading.Event()

    def slowly(settings):
        go.wait(60)
        return Room.load(settings)

    with serving(endless, wait=False, load=slowly, cache_mb=16) as server:
        wait_until(lambda: _status(server) is not None, "it listens")
        assert _status(server) == 503
        with pytest.raises(openai.InternalServerError, match="loaded"):
            server.client().completions.create(model="endless", prompt="a")
        go.set()
        wait_until(lambda: _status(server) == 200, "the model is loaded")


def _status(server):
    try:
        return httpx.get(f"{server.url}/health").status_code
    except httpx.TransportError:
        return None


def test_embeddings_of_an_encoder(encoder):
    from zeroskip.cli import models
    from zeroskip.demo.task import embed

    with serving(encoder) as server:
        texts = ["sort a list", "open the file of the key", "a"]
        got = server.client().embeddings.create(model=server.name, input=texts)
        want = embed(models.load(str(encoder)), models.load_tokenizer(str(encoder)), texts)
        assert np.allclose([row.embedding for row in got.data], want.numpy(), atol=1e-5)
        as_floats = server.client().embeddings.create(model=server.name, input=texts[0], encoding_format="float")
        assert np.allclose(as_floats.data[0].embedding, want[0].numpy(), atol=1e-5)
        raw = server.post("/v1/embeddings", json={"model": server.name, "input": "a", "encoding_format": "base64"})
        decoded = np.frombuffer(base64.b64decode(raw.json()["data"][0]["embedding"]), dtype="<f4")
        assert np.allclose(decoded, want[2].numpy(), atol=1e-5)
        for bad, said in (("a " * 200, "64"), ("", "empty"), ([[10**6]], "1000000")):
            with pytest.raises(openai.BadRequestError, match=said):
                server.client().embeddings.create(model=server.name, input=bad)
        with pytest.raises(openai.BadRequestError, match="encoder"):
            server.client().completions.create(model=server.name, prompt="a")


def test_an_answer_ends_where_the_model_ends_it(decoder):
    with serving(decoder, cache_mb=16) as server:
        tokenizer, model = server.room.tokenizer, server.room.model
        create = server.client().completions.create
        for seed in range(40):
            got = create(model=server.name, prompt="a", max_tokens=40, seed=seed, temperature=2)
            if got.choices[0].finish_reason == "stop":
                break
        assert got.choices[0].finish_reason == "stop" and got.usage.completion_tokens < 40
        assert tokenizer.eos_token not in got.choices[0].text and model.config.eos_token_id == tokenizer.eos_token_id


def test_a_process_finishes_what_runs_when_it_is_told_to_stop(endless):
    process = zeroskip_process("serve", endless, "--port", 0, "--cache-mb", 16)
    try:
        url = process.stdout.readline().split()[2].rstrip(",")
        assert process.stdout.readline().startswith("ready: endless, up to 2048 tokens")
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(model="endless", prompt="a", max_tokens=300, temperature=0, stream=True)
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 0 and out == "stopped\n" and errors == ""
    finally:
        process.kill()


def test_a_second_interrupt_ends_what_runs(endless):
    process = zeroskip_process("serve", endless, "--port", 0, "--cache-mb", 16)
    try:
        url = process.stdout.readline().split()[2].rstrip(",")
        process.stdout.readline()
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(model="endless", prompt="a", max_tokens=2000, temperature=0, stream=True)
        next(iter(stream))
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 0 and out == "stopped\n" and errors == ""
    finally:
        process.kill()


def test_what_cannot_be_served(encoder, endless, tmp_path, monkeypatch):
    assert "no such directory" in refused("serve", tmp_path / "none")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert "NO_SUCH_KEY" in refused("serve", endless, "--api-key-env", "NO_SUCH_KEY")
    assert "port is 70000: give at most 65535" in refused("serve", endless, "--port", 70000)
    assert "max_concurrency is 0" in refused("serve", endless, "--max-concurrency", 0)
    assert "max_context is 4096" in refused("serve", endless, "--max-context", 4096, "--port", 0)
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in ("config.json", "model.safetensors"):
        (bare / file).write_bytes((endless / file).read_bytes())
    assert "has no tokenizer" in refused("serve", bare, "--port", 0)
    config = json.loads((endless / "config.json").read_text())
    (bare / "tokenizer.json").write_bytes((endless / "tokenizer.json").read_bytes())
    (bare / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForTokenClassification"]}))
    refused("serve", bare, "--port", 0)
