"""Language models of many architectures: pruned, compiled, stored, loaded, and generating what they did before."""

import signal
import time

import pytest
import torch
import transformers
from cli_models import cli, refused, write_endless, zeroskip_process
from planning import inject, prefer

import zeroskip as zs
from zeroskip.cli import models
from zeroskip.nn import PackedLinear

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # far from level logits
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
CAUSAL = {
    "Llama": SIZES,
    "Qwen3": SIZES,
    "Mistral": SIZES | {"sliding_window": 6},
    "Gemma3Text": SIZES | SLIDING,
    "Phi": SIZES,
    "GPT2": {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
    | {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0},
    "OPT": SIZES | {"ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.2},
    "Qwen3Moe": SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}
ENCODERS = {"Bert": transformers.BertModel, "T5": transformers.T5EncoderModel}
ENCODING = {
    "Bert": SIZES,
    "T5": {
        "vocab_size": 96,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_heads": 4,
        "pad_token_id": 0,
    },
}
IDS = torch.tensor([[5, 9, 33, 70, 12, 8], [7, 7, 61, 2, 90, 41]])


def build(name, kind):
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**(CAUSAL | ENCODING)[name])
    return (kind.from_config if hasattr(kind, "from_config") else kind)(config).eval()


def compiled(model, monkeypatch):
    """Half of the weights zero, and every site packed."""
    inject(monkeypatch, prefer("bitmask"))
    zs.prune(model, "magnitude", sparsity=0.5)
    return zs.compile(model, tokens=(1, 8))


def packed(model):
    return [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]


def generated(model, **options):
    chosen = {"max_new_tokens": 12, "do_sample": False} | options
    with torch.inference_mode():
        return model.generate(IDS, attention_mask=torch.ones_like(IDS), **chosen)


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models_generate_what_they_did_before(name, monkeypatch, tmp_path):
    model = build(name, transformers.AutoModelForCausalLM)
    zs.prune(model, "magnitude", sparsity=0.5)
    dense = generated(model)
    compiled(model, monkeypatch)
    assert len(packed(model)) >= 8
    zs.save(model, tmp_path / "out")
    loaded = zs.load(tmp_path / "out")
    assert type(loaded) is type(model) and packed(loaded) == packed(model)
    assert torch.equal(generated(loaded), generated(model))
    assert torch.equal(generated(loaded), dense)
    with torch.inference_mode():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_give_what_they_did_before(name, monkeypatch, tmp_path):
    model = build(name, ENCODERS[name])
    compiled(model, monkeypatch)
    assert len(packed(model)) >= 12
    zs.save(model, tmp_path / "out")
    loaded = zs.load(tmp_path / "out")
    with torch.inference_mode():
        assert torch.equal(loaded(IDS)[0], model(IDS)[0])


def test_generate_takes_its_options_and_pipelines_work(monkeypatch, tmp_path):
    write_endless(tmp_path / "dense")
    model = compiled(zs.load(tmp_path / "dense"), monkeypatch)
    zs.save(model, tmp_path / "out", tokenizer=models.Companions(str(tmp_path / "dense")))
    loaded = zs.load(tmp_path / "out")
    ids = IDS % 40
    for options in (
        {"num_beams": 3},
        {"do_sample": True, "temperature": 0.7, "top_k": 5},
        {"num_return_sequences": 2, "do_sample": True},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
        {"use_cache": False},
    ):
        outs = []
        for network in (model, loaded):
            torch.manual_seed(0)
            with torch.inference_mode():
                row = ids[:1] if "prompt_lookup_num_tokens" in options else ids
                out = network.generate(
                    row, attention_mask=torch.ones_like(row), max_new_tokens=6, pad_token_id=0, **options
                )
            outs.append(out)
        assert torch.equal(*outs), options
        assert outs[0].shape[1] == ids.shape[1] + 6
    speak = transformers.pipeline("text-generation", model=str(tmp_path / "out"))
    assert packed(speak.model)
    said = speak("sort a list", max_new_tokens=5, do_sample=False, return_full_text=False)[0]["generated_text"]
    result = cli("run", tmp_path / "out", "--prompt", "sort a list", "--max-new-tokens", 5)
    assert result.exit_code == 0 and result.stdout.strip() == f"sort a list {said.strip()}"
    again = [
        cli("run", tmp_path / "out", "--prompt", "a key", "--temperature", 1.5, "--seed", seed).stdout
        for seed in (1, 1, 2)
    ]
    assert again[0] == again[1] != again[2]


def test_dense_weights_generate_the_tokens_of_transformers(data):
    folder = data("pylm15m")
    ours, theirs = zs.load(folder), transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = "def read_lines(path):\n"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    outs = [
        m.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False) for m in (ours, theirs)
    ]
    assert torch.equal(*outs)
    result = cli("run", folder, "--prompt", prompt, "--max-new-tokens", 24)
    assert result.stdout == tokenizer.decode(outs[0][0], skip_special_tokens=True) + "\n"
    assert "24 tokens: the first after" in result.stderr


def test_chat_keeps_the_conversation(tmp_path):
    folder = write_endless(tmp_path / "m", context=64)
    words = ("chat", folder, "--max-new-tokens", 8, "--json", tmp_path / "chat.json")
    result = cli(*words, input="sort a list\n\nthe key\n/new\nthe key\n")
    assert result.exit_code == 0, result.stderr
    first, second, third = result.stdout.splitlines()
    assert first and second and second != third  # the second answer has seen the first turn
    alone = cli(*words, input="the key").stdout.splitlines()[0]
    assert third == alone
    full = cli(*words, input="a " * 70 + "\nthe key\n")
    assert "shorten it" in full.stderr and full.stdout.splitlines() == [alone]


def test_what_cannot_converse_or_continue(encoder, tmp_path):
    assert "does not converse" in refused("chat", encoder)
    folder = write_endless(tmp_path / "m", context=64)
    assert "shorten it" in refused("run", folder, "--prompt", "a " * 65)
    assert "--temperature -1" in refused("run", folder, "--prompt", "a", "--temperature", -1)
    assert "--top-p 0" in refused("run", folder, "--prompt", "a", "--top-p", 0)
    assert "no token" in refused("run", folder, "--prompt", "")


def test_ctrl_c_stops_an_answer_and_keeps_it(tmp_path):
    folder = write_endless(tmp_path / "m", context=8192)
    process = zeroskip_process("run", folder, "--prompt", "a", "--max-new-tokens", 8000)
    try:
        assert process.stdout.read(20).strip()  # the answer has begun
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130 and time.monotonic() - began < 30
        assert "tokens: the first after" in errors and errors.splitlines()[-1] == "zeroskip: interrupted"
    finally:
        process.kill()
