"""Perplexity against a float64 brute force, the tasks of lm-eval, and what both refuse."""

import gzip
import json
import math
import sys
import types

import pytest
import torch
from cli_models import WORDS, cli, refused
from tiny_models import bert, llama, t5

from zeroskip.errors import ZeroskipError
from zeroskip.io import load
from zeroskip.quality import perplexity, run_tasks

STRINGS = [" ".join(WORDS[(3 * at + step) % len(WORDS)] for step in range(5 + at)) for at in range(6)]


@pytest.fixture(scope="module")
def tokenizer(decoder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(decoder)


def brute_force(model, stream, context, stride):
    """One float64 forward for every scored token."""
    starts = range(0, max(1, len(stream) - context + 1), stride)
    losses = []
    for at in range(1, len(stream)):
        start = next((start for start in starts if start < at < start + context), None)
        if start is not None:
            logits = model(input_ids=torch.tensor([stream[start:at]])).logits[0, -1]
            losses.append(-float(torch.log_softmax(logits, 0)[stream[at]]))
    return len(losses), sum(losses) / len(losses)


@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 3), (7, 1), (13, 12), (2, 2), (64, 64)])
def test_perplexity_is_that_of_a_float64_brute_force(decoder, tokenizer, context, stride):
    model = load(decoder)
    stream = [token for string in STRINGS for token in [*tokenizer(string)["input_ids"], tokenizer.eos_token_id]]
    found = perplexity(model, STRINGS, tokenizer, context=context, stride=stride)
    with torch.no_grad():
        count, nll = brute_force(model.double(), stream, context, stride)
    assert found.tokens == count
    assert found.nll == pytest.approx(nll, rel=1e-5) and found.value == pytest.approx(math.exp(nll), rel=1e-5)


def test_batches_and_windows_do_not_change_the_figure(decoder, tokenizer, monkeypatch):
    from zeroskip.quality import perplexity as function

    room = sys.modules[function.__module__]
    model = load(decoder)
    many = perplexity(model, STRINGS, tokenizer, context=6, stride=4)
    monkeypatch.setattr(room, "BATCH", 1)
    assert perplexity(model, STRINGS, tokenizer, context=6, stride=4).nll == pytest.approx(many.nll, rel=1e-6)
    short = perplexity(model, ["return the list"], tokenizer)  # shorter than the one window
    assert (short.windows, short.tokens, short.context, short.stride) == (1, 3, 64, 64)


def test_a_list_a_file_and_compressed_json_are_one_text(decoder, tokenizer, tmp_path):
    model = load(decoder)
    path = tmp_path / "text.json.gz"
    path.write_bytes(gzip.compress(json.dumps(STRINGS).encode()))
    plain = tmp_path / "text.txt"
    plain.write_text(STRINGS[3])
    assert perplexity(model, path, tokenizer).nll == perplexity(model, STRINGS, tokenizer).nll
    assert perplexity(model, str(plain), tokenizer).nll == perplexity(model, [STRINGS[3]], tokenizer).nll


def test_the_model_stays_as_it_was(decoder, tokenizer):
    model = load(decoder).train()
    model.lm_head.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    perplexity(model, STRINGS, tokenizer, context=8)
    assert model.training and not model.lm_head.training and model.model.layers[0].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (STRINGS, {"context": 65}, "context is 65: give 2 to 64"),
        (STRINGS, {"context": 1}, "context is 1"),
        (STRINGS, {"context": 8, "stride": 9}, "stride is 9: give 1 to 8"),
        (STRINGS, {"stride": 0}, "stride is 0"),
        (STRINGS, {"context": 2.5}, "context is 2.5"),
        ([], {}, "holds no text"),
        (["  "], {}, "holds no text"),
        ([7], {}, "no string"),
        ("missing.txt", {}, "no readable UTF-8 file"),
    ],
)
def test_bad_input_gets_one_line(decoder, tokenizer, text, options, message):
    with pytest.raises(ZeroskipError, match=message) as caught:
        perplexity(load(decoder), text, tokenizer, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"[1"),
        ("a.json", b'{"a": 1}'),
        ("a.txt.gz", b"no gzip"),
        ("a.gz", gzip.compress(b"a" * 99, mtime=0)[:-9]),
    ],
)
def test_a_damaged_file_gets_one_line(decoder, tokenizer, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ZeroskipError, match="text="):
        perplexity(load(decoder), tmp_path / name, tokenizer)


class Blind(torch.nn.Module):
    """Returns what it was told to."""

    def __init__(self, value, size=40):
        super().__init__()
        self.logits = torch.full((size,), value)

    def forward(self, input_ids):
        return self.logits.expand(*input_ids.shape, -1)


def test_a_model_that_cannot_be_scored_gets_one_line(tokenizer):
    from transformers import BertForMaskedLM

    looks = BertForMaskedLM(bert().config).eval()
    for model, message in (
        (t5(), "encoder and a decoder"),
        (bert(), "no logits"),
        (looks, "looks ahead"),
        (Blind(math.nan), "returns NaN"),
        (Blind(0.0, size=12), "has no logit"),
    ):
        with pytest.raises(ZeroskipError, match=message):
            perplexity(model, STRINGS, tokenizer, context=32)
    with pytest.raises(ZeroskipError, match="pass tokenizer="):
        perplexity(llama(), STRINGS, None)
    assert perplexity(Blind(0.0), STRINGS, tokenizer).value == pytest.approx(40)


def test_a_tokenizer_of_another_model_gets_one_line(tokenizer):
    model = llama()
    model.resize_token_embeddings(10)
    with pytest.raises(ZeroskipError, match="is the tokenizer its own"):
        perplexity(model, STRINGS, tokenizer)


def test_eval_from_the_command_line(decoder, encoder, tmp_path, monkeypatch):
    text = tmp_path / "held.json"
    text.write_text(json.dumps(STRINGS))
    result = cli("eval", decoder, "--text", text, "--context", 8, "--stride", 4, "--json", tmp_path / "eval.json")
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "eval.json").read_text())["perplexity"]
    assert f"perplexity {told['value']:.2f}" in result.stdout and told["stride"] == 4 and told["dtype"] == "float32"
    assert "nothing to measure" in refused("eval", decoder)
    assert "no causal language model" in refused("eval", encoder, "--text", text)
    assert "context is 99" in refused("eval", decoder, "--text", text, "--context", 99)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "zeroskip[eval]" in refused("eval", decoder, "--tasks", "hellaswag")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((decoder / name).read_bytes())
    assert "has no tokenizer" in refused("eval", bare, "--text", text)


def test_tasks_are_those_of_lm_eval(monkeypatch):
    asked = {}

    def simple_evaluate(**given):
        asked.update(given)
        if "broken" in given["tasks"]:
            raise OSError("no data\nand more lines")
        return {"results": {"good": {"alias": "good", "acc,none": 0.5, "acc_stderr,none": "N/A", "flag": True}}}

    package = types.ModuleType("lm_eval")
    package.simple_evaluate = simple_evaluate
    served, tasks = types.ModuleType("lm_eval.models.huggingface"), types.ModuleType("lm_eval.tasks")
    served.HFLM = lambda **given: given["pretrained"]
    tasks.TaskManager = lambda: types.SimpleNamespace(all_tasks=["good", "broken"])
    for name, module in {"lm_eval": package, served.__name__: served, tasks.__name__: tasks}.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert run_tasks("model", "tokenizer", ["good"], limit=3) == {"good": {"acc": 0.5}}
    assert asked["model"] == "model" and asked["limit"] == 3
    with pytest.raises(ZeroskipError, match="did you mean 'good'"):
        run_tasks("model", "tokenizer", ["goood"])
    with pytest.raises(ZeroskipError, match=r"cannot run broken: no data$"):
        run_tasks("model", "tokenizer", ["broken"])


def test_tasks_without_lm_eval_name_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ZeroskipError, match=r"pip install 'zeroskip\[eval\]'"):
        run_tasks(llama(), None, ["hellaswag"])
