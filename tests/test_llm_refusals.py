"""Bad input to the commands for language models: each is one line, exit code 2, and nothing is written."""

import pytest
import torch
from cli_models import cli, refused, write_tokenizer

from zeroskip.errors import ZeroskipError
from zeroskip.prune import Recipe, recipes
from zeroskip.prune.recipe import DEFAULTS

RECIPE = ("--recipe", "llm-int4-50", "--text", "TEXT")


@pytest.fixture
def bare(decoder, tmp_path):
    """A language model without its tokenizer."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((decoder / name).read_bytes())
    return folder


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("run", "--prompt", "a"), "is an encoder (BertModel): give --text LINE, not --prompt"),
        (("chat",), "is a BertModel, which does not converse: give a causal language model"),
        (("eval", "--text", "TEXT"), "a BertModel is no causal language model"),
        (("bench", "llm", "--tokens", "8", "--model"), "a BertModel is no causal language model"),
    ],
)
def test_a_model_that_is_not_causal(encoder, text, words, problem):
    command = [text if word == "TEXT" else word for word in words]
    command.insert(len(command) if words[-1] == "--model" else 1, encoder)
    assert problem in refused(*command)


@pytest.mark.parametrize(
    "words",
    [
        ("run", "DIR", "--prompt", "a"),
        ("chat", "DIR"),
        ("eval", "DIR", "--text", "TEXT"),
        ("serve", "DIR", "--port", "0"),
        ("prune", "DIR", "OUT", *RECIPE),
    ],
)
def test_a_tokenizer_that_is_missing(bare, text, tmp_path, words):
    if words[0] == "serve":
        pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'zeroskip[serve]'")
    given = {"DIR": bare, "TEXT": text, "OUT": tmp_path / "out"}
    assert "has no tokenizer: copy its files" in refused(*[given.get(word, word) for word in words])
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


def test_a_tokenizer_of_another_model(bare, text):
    write_tokenizer(bare, [f"[{number}]" for number in range(200)])
    said = refused("run", bare, "--prompt", "read the file")
    assert "the prompt holds token" in said and "its tokenizer is another's" in said
    assert "tokenizer" in refused("eval", bare, "--text", text)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("run", "DIR", "--prompt", "a " * 70), "the prompt has 70 tokens, and the model knows 64 positions"),
        (("eval", "DIR", "--text", "TEXT", "--context", "65"), "64"),
        (("serve", "DIR", "--port", "0", "--max-context", "65"), "max_context is 65: the model knows 64 positions"),
        (("bench", "llm", "--tokens", "65", "--model", "DIR"), "the model knows 64 positions"),
        (("prune", "DIR", "OUT", *RECIPE, "--eval-text", "TEXT", "--eval-context", "65"), "64"),
    ],
)
def test_a_context_longer_than_the_models(decoder, text, tmp_path, words, problem):
    if words[0] == "serve":
        pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'zeroskip[serve]'")
    given = {"DIR": decoder, "TEXT": text, "OUT": tmp_path / "out"}
    assert problem in refused(*[given.get(word, word) for word in words])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--group-size", "48"), "group_size is 48: one scale serves 32, 64 or 128 inputs"),
        (("--group-size", "0"), "group_size is 0"),
        (("--embeddings", "int5"), "embeddings is 'int5': give 'int8', 'int4' or 'none'"),
        (("--values", "int8"), "values is 'int8', and 'int4' in the recipe"),
        (("--recipe", "llm-int4-5"), "did you mean 'llm-int4-50'"),
        (("--recipe", "none", "--embeddings", "int8"), "leaves all layers dense: leave embeddings out"),
        (("--recipe", "llm-bf16-8:16@64", "--group-size", "32"), "does not quantise: leave values and group_size out"),
    ],
)
def test_integers_that_cannot_be(decoder, text, tmp_path, options, problem):
    given = ("--recipe", "llm-int4-50", "--text", text, *options)
    assert problem in refused("prune", decoder, tmp_path / "out", *given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name in recipes() if "int" in name])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize(("embeddings", "size_of_tables"), [(None, None), ("int4", 64), ("none", None)])
def test_arguments_replace_group_size_and_embeddings(name, size, embeddings, size_of_tables):
    read = Recipe.read(DEFAULTS | {"group_size": size, "embeddings": embeddings}, name)
    inside = read.settings("model.layers.0.mlp.up_proj").settings
    assert inside.integers.group_size == size and inside.integers.values == name.split("-")[1]
    if embeddings == "none":
        return
    for table in ("lm_head", "model.embed_tokens", "transformer.wte"):
        settings = read.settings(table).settings
        assert settings.composition.name == "rtn"
        assert settings.integers.values == (embeddings or "int8") and settings.integers.group_size == (
            size_of_tables or size
        )


def test_what_was_recorded_is_read_again():
    given = Recipe.read(DEFAULTS | {"group_size": 128, "embeddings": "int4"}, "llm-int4-50")
    again = Recipe.read(DEFAULTS, given.values)
    assert again.values == given.values and again.rules == given.rules
    with pytest.raises(ZeroskipError, match="embeddings is 8"):
        Recipe.read(DEFAULTS, {"method": "gptq", "embeddings": 8})


def test_a_rule_has_the_last_word_on_a_table():
    rule = {"include": "lm_head", "dense": True}
    read = Recipe.read(DEFAULTS, {"method": "gptq", "embeddings": "int8", "rules": [rule]})
    assert read.settings("lm_head").settings is None
    assert read.settings("model.embed_tokens").settings.integers.values == "int8"


@pytest.mark.usefixtures("short_races")
def test_a_layer_that_is_not_supported_stays_dense_and_the_plan_says_so(tmp_path):
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    folder = tmp_path / "experts"
    size = write_tokenizer(folder, ["<pad>", "<unk>", "<eos>"])
    torch.manual_seed(0)
    sizes = {"vocab_size": size, "hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
    Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads, **experts, num_hidden_layers=1)).save_pretrained(folder)
    result = cli("compile", folder, tmp_path / "out", "--tokens", 1)
    assert result.exit_code == 0, result.stderr
    assert "note: model.layers.0.feed_forward.experts.down_proj: stays dense, " in result.stdout
    assert "computes in a way of its own" in result.stdout
