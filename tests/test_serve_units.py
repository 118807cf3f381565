"""The parts of the server by themselves: drawing tokens, decoding, attention, rows that keep their bits."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cli_models import write_endless
from hypothesis import given
from hypothesis import strategies as st
from serving import serving
from torch import nn

import zeroskip as zs
from zeroskip.model import find_sites
from zeroskip.nn import PackedLinear
from zeroskip.planning.install import put_in
from zeroskip.planning.invariant import RowByRow, make_invariant
from zeroskip.planning.rows import is_invariant
from zeroskip.serve import Settings
from zeroskip.serve.attention import ragged, ragged_rows
from zeroskip.serve.prompts import chat_tokens
from zeroskip.serve.sampling import Sampler, Sampling
from zeroskip.serve.sizes import Sizes, bytes_a_token
from zeroskip.serve.text import Decoder, Stops


def frequencies(sampling, logits, draws=4000):
    drawn = torch.tensor([sampling.draw(logits, []) for _ in range(draws)])
    return torch.bincount(drawn, minlength=len(logits)) / draws


def test_draws_follow_the_chances():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    for temperature in (0.5, 1.0, 2.0):
        got = frequencies(Sampling(temperature, seed=0), logits)
        assert (got - torch.softmax(logits / temperature, 0)).abs().max() < 0.03
    # .644 .237 .087 .032: half of it is in the first, nine tenths in the first three
    assert frequencies(Sampling(1.0, top_p=0.5, seed=0), logits)[0] == 1
    assert frequencies(Sampling(1.0, top_p=0.9, seed=0), logits)[3] == 0
    two = frequencies(Sampling(1.0, top_k=2, seed=0), logits)
    assert two[2] == two[3] == 0 and abs(float(two[0]) - 0.731) < 0.03


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40), st.floats(5e-324, 2), st.floats(5e-324, 1))
def test_any_setting_draws_a_token(logits, temperature, top_p):
    token = Sampling(temperature, top_p=top_p, top_k=3, seed=1).draw(torch.tensor(logits), [0])
    assert 0 <= token < len(logits)
    assert Sampling(0.0).draw(torch.tensor(logits), []) == int(torch.tensor(logits).argmax())
    broken = torch.tensor([*logits, float("nan")])
    assert 0 <= Sampling(temperature, top_p=top_p).draw(broken, []) <= len(logits)


def test_penalties_and_seeds():
    logits = torch.tensor([1.0, 0.9, 0.0])
    assert Sampling(0.0, presence_penalty=0.2).draw(logits, [0]) == 1
    assert Sampling(0.0, presence_penalty=0.05).draw(logits, [0, 0, 0]) == 0
    assert Sampling(0.0, frequency_penalty=0.05).draw(logits, [0, 0, 0]) == 1
    assert torch.equal(logits, torch.tensor([1.0, 0.9, 0.0]))
    draws = [[s.draw(torch.zeros(1000), []) for _ in range(5)] for s in (Sampling(1.0, seed=3), Sampling(1.0, seed=3))]
    assert draws[0] == draws[1]
    again = Sampling(1.0, seed=3)
    assert again.draw(torch.zeros(1000), []) == draws[0][0]
    assert copy.deepcopy(again).draw(torch.zeros(1000), []) == draws[0][1]  # the stream goes on


@given(st.text(alphabet="ab", max_size=30), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
def test_stops_cut_where_a_search_in_the_whole_text_does(text, stops):
    found = min((text.find(stop) for stop in stops if stop in text), default=len(text))
    stopper = Stops(stops)
    shown = "".join(stopper.add(letter) for letter in text) + stopper.finish()
    # A stop string that is complete earlier ends the answer, though a longer one may have begun before it.
    first = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=None)
    assert stopper.hit == (first is not None)
    if first is None:
        assert shown == text
    else:
        seen = text[:first]
        assert shown == seen[: min(seen.find(stop) for stop in stops if stop in seen)] and len(shown) >= found


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens, **_):
        return bytes(tokens).decode("utf-8", errors="replace")


@given(st.text(max_size=20))
def test_decoder_gives_the_text_without_half_characters(text):
    decoder = Decoder(Bytes())
    pieces = [decoder.add([byte]) for byte in text.encode()]
    assert "".join(pieces) + decoder.finish() == text
    assert all("\ufffd" not in piece or "\ufffd" in text for piece in pieces)


class Cache:
    """Gives back all keys and values, as transformers' paged cache does."""

    def __init__(self, key, value, starts):
        self.all, self.starts = (key, value), starts

    def update(self, key_states, value_states, layer_idx, kwargs):
        kwargs["cu_seq_lens_k"] = torch.tensor(self.starts)
        return self.all


@pytest.mark.parametrize("function", [ragged, ragged_rows])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("updated", [False, True])  # by the layer itself, as transformers has it since 5.24
def test_attention_meets_a_float64_oracle(function, window, updated):
    generator = torch.Generator().manual_seed(0)
    new, old, heads, shared, size = (4, 1, 0, 3), (0, 6, 5, 2), 4, 2, 8
    if window is not None:  # the cache of such a layer gives the last tokens only
        old = tuple(min(count, window - 1) for count in old)
    totals = [a + b for a, b in zip(new, old, strict=True)]
    q = torch.randn(1, heads, sum(new), size, generator=generator)
    k, v = (torch.randn(1, shared, sum(totals), size, generator=generator) for _ in range(2))
    q_at, k_at = ([0, *torch.tensor(counts).cumsum(0).tolist()] for counts in (new, totals))
    module = nn.Module()
    module.layer_idx = 0
    starts = torch.tensor(q_at, dtype=torch.int32)
    if updated:
        given, more = (k, v), {"cu_seq_lens_k": torch.tensor(k_at, dtype=torch.int32)}
    else:
        given, more = (k[:, :, :0], v[:, :, :0]), {"cache": Cache(k, v, k_at)}
    got, _ = function(module, q, *given, None, cu_seq_lens_q=starts, scaling=0.3, sliding_window=window, **more)
    for request in range(len(new)):
        for token in range(new[request]):
            last = k_at[request + 1] - new[request] + token
            first = k_at[request] if window is None else max(k_at[request], last - window + 1)
            for head in range(heads):
                keys, values = (x[0, head // (heads // shared), first : last + 1].double() for x in (k, v))
                row = q_at[request] + token
                want = torch.softmax(keys @ q[0, head, row].double() * 0.3, 0) @ values
                assert (got[0, row, head].double() - want).abs().max() < 1e-5


def test_rows_of_a_layer_that_adds_in_another_order_are_told_apart():
    class Order(nn.Linear):
        def forward(self, x):
            flipped = x.flip(-1) @ self.weight.flip(-1).t() if len(x) > 2 else x @ self.weight.t()
            return flipped

    x = torch.randn(256, 300, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    layer = Order(300, 40)
    assert not is_invariant(layer, x, 4)
    assert is_invariant(RowByRow(layer), x, 4)
    model = nn.Sequential(layer)
    assert make_invariant(model, 4) == {"row by row": 1} and isinstance(model[0], RowByRow)
    assert torch.equal(model(x[None])[0, 5], x[5:6].matmul(layer.weight.t())[0])


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A pruned model with packed layers of several kinds."""
    folder = tmp_path_factory.mktemp("packed")
    model = zs.load(write_endless(folder / "dense"))
    kinds = ("bitmask", "fp32"), ("bitmask", "int8"), ("csr", "fp32"), ("dense", "bf16")
    for number, site in enumerate(find_sites(model)):
        weight = site.weight()[0].clone()
        weight[weight.abs() < weight.abs().median()] = 0
        layout, values = kinds[number % len(kinds)]
        put_in(model, site.module, PackedLinear.from_packed(zs.pack(weight, format=layout, values=values)))
    from zeroskip.cli import models

    zs.save(model, folder / "packed", tokenizer=models.Companions(str(folder / "dense")))
    return folder / "packed"


def test_batch_invariant_clients_get_what_they_get_alone(packed, monkeypatch):
    seen = {}
    plain = Sampler.__call__

    def noted(self, scores, tensor_arg):
        for row, state in enumerate(self._states):
            place = (*state.initial_tokens, *state.generated_tokens)
            seen.setdefault(place, set()).add(scores[row].numpy().tobytes())
        return plain(self, scores, tensor_arg)

    monkeypatch.setattr(Sampler, "__call__", noted)
    prompts = [f"{'a list of the key ' * (number % 5)}open" for number in range(16)]
    with serving(packed, batch_invariant=True, cache_mb=64) as server:
        assert 0.4 < server.metric("zeroskip_sparsity") < 0.6 and server.metric("zeroskip_packed_layers") == 14

        def ask(prompt):
            asked = {"model": server.name, "max_tokens": 40, "temperature": 0}
            return server.client().completions.create(prompt=prompt, **asked).choices[0].text

        alone = [ask(prompt) for prompt in prompts]
        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(ask, prompts)) == alone
        assert len(set(alone)) > 4
    assert len(seen) > 5 * 40 and all(len(bits) == 1 for bits in seen.values())  # the logits, bit for bit


def test_a_full_cache_makes_requests_wait_and_loses_nothing(packed):
    with serving(packed, cache_mb=1, max_concurrency=8) as server:
        engine = server.room.engine
        assert engine.sizes.pages * engine.sizes.page < 8 * 300

        def ask(prompt):
            asked = {"model": server.name, "max_tokens": 300, "temperature": 0}
            return server.client().completions.create(prompt=prompt, **asked).usage.completion_tokens

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, [f"word{number}" for number in range(8)])) == [300] * 8


def test_sizes(tmp_path):
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3, max_position_embeddings=512
    )
    assert bytes_a_token(config, torch.float32) == 2 * 3 * 2 * 16 * 4
    sizes = Sizes.of(config, torch.float32, Settings(tmp_path, max_concurrency=4))
    assert sizes.context == 512 and sizes.pages * sizes.page >= 4 * 512
    one = Sizes.of(config, torch.float32, Settings(tmp_path, max_concurrency=1))
    assert one.context == 512
    small = Sizes.of(config, torch.float32, Settings(tmp_path, cache_mb=1))
    assert small.pages * small.page * 768 <= 1 << 20 and small.context < small.pages * small.page
    with pytest.raises(zs.ZeroskipError, match="513"):
        Sizes.of(config, torch.float32, Settings(tmp_path, max_context=513))
    config.num_hidden_layers = 30
    with pytest.raises(zs.ZeroskipError, match=r"max_context is 512.*1 MB holds 102 tokens.*give --cache-mb 5 "):
        Sizes.of(config, torch.float32, Settings(tmp_path, max_context=512, cache_mb=1))
    assert Sizes.of(config, torch.float32, Settings(tmp_path, max_context=512, cache_mb=5)).context == 512
    huge = LlamaConfig(hidden_size=65536, num_attention_heads=1, num_hidden_layers=100)
    with pytest.raises(zs.ZeroskipError, match="give --cache-mb"):
        Sizes.of(huge, torch.float32, Settings(tmp_path, cache_mb=1))


def test_chat_without_and_with_a_template(tmp_path):
    write_endless(tmp_path / "m")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    messages = [{"role": "user", "content": "a list"}, {"role": "assistant", "content": "the key"}]
    assert tokenizer.decode(chat_tokens(tokenizer, messages)) == "a list the key"
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content }} {% endfor %}{% if add_generation_prompt %}return{% endif %}"
    )
    assert tokenizer.decode(chat_tokens(tokenizer, messages)) == "a list the key return"
    with pytest.raises(zs.ZeroskipError, match="no system"):
        chat_tokens(tokenizer, [{"role": "system", "content": "a"}])
