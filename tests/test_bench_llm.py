"""The benchmark of language models: who takes part, what is measured, what is refused."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from cli_models import cli, refused, shorten_races, shorter, write_decoder, write_encoder, write_endless

import zeroskip as zs
from zeroskip.bench import llm, llm_make, llm_models, llm_profile
from zeroskip.bench.llm import Settings, bench_llm, rivals
from zeroskip.bench.llm_models import Step, prompt, random_model, without_data
from zeroskip.bench.llm_results import Contender, Footprint, LlmTable
from zeroskip.bench.llm_steps import profile_table
from zeroskip.bench.suites import Transformer
from zeroskip.errors import ZeroskipError
from zeroskip.nn import PackedLinear
from zeroskip.prune import prune, recipes
from zeroskip.prune.recipe import DEFAULTS

TINY = Transformer("tiny", 2, 128, 128, 64, 192)
ALONE = Footprint(2.0, 0.5, 0.25, 300_000_000, 500_000_000)


@pytest.fixture
def quick(monkeypatch):
    """Short races, a tiny shape, and no processes beside this one."""
    shorten_races(monkeypatch)
    monkeypatch.setattr(llm, "race", shorter(llm.race))
    monkeypatch.setattr(llm, "alone", lambda *about: ALONE)
    monkeypatch.setitem(llm_models.SHAPES, "llama-1b", TINY)
    monkeypatch.setattr(llm_models, "VOCABULARY", 96)
    monkeypatch.setenv("ZEROSKIP_PEERS", "none/here")


@pytest.fixture
def endless(tmp_path):
    return write_endless(tmp_path / "dense", context=128)


# The whole ------------------------------------------------------------------------------------------------------------


def test_a_model_is_measured_with_its_rivals_and_what_is_missing_is_named(quick, endless, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("read the file line in order return a list of name key " * 20)
    out, work = tmp_path / "out.json", tmp_path / "work"
    result = cli(
        "bench", "llm", "--model", endless, "--recipes", "none,llm-int4-50", "--tokens", "8,16", "--batch", "1,3",
        "--threads", "1", "--calibration", text, "--text", text, "--context", "32", "--work", work, "--json", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    told = json.loads(out.read_text())
    names = ["torch fp32", "torch bf16", "none", "llm-int4-50"]
    assert [one["name"] for one in told["contenders"]] == names
    kept = [*names, "none pruned", "llm-int4-50 pruned", "made.json"]
    assert sorted(path.name for path in work.iterdir()) == sorted(kept)
    for one in told["contenders"]:
        assert one["problem"] is None and one["disk_bytes"] > 0 and one["perplexity"]["value"] > 1
        assert one["footprint"]["peak_bytes"] == ALONE.peak_bytes
    assert told["contenders"][0]["disk_bytes"] > 1.9 * told["contenders"][1]["disk_bytes"]
    asked = {("first token", 8, 1), ("first token", 16, 1), ("decode", 8, 1), ("decode", 8, 3)}
    assert {(each["what"], each["tokens"], each["batch"]) for each in told["times"]} == asked
    for each in told["times"]:
        assert set(each["faster_than"]) == set(names) - {each["contender"]}
        made = each["batch"] if each["what"] == "decode" else each["tokens"]
        assert each["tokens_a_second"] == pytest.approx(1e3 * made / each["ms"])
        for ratio in each["faster_than"].values():
            assert ratio["low"] <= ratio["value"] <= ratio["high"]
    assert set(told["missing"]) == set(rivals()) and "llama_cpp" in told["missing"]
    assert [step["method"] for step in told["contenders"][3]["steps"]] == ["admm+gptq+cd+ls"]
    assert told["settings"]["tokens"] == [8, 16] and told["versions"]["torch"] == torch.__version__
    shown = result.stdout
    assert all(name in shown for name in names) and "missing: llama_cpp: " in shown
    assert "decode, 8 tokens, batch 3, threads 1" in shown and "500.0 MB (300.0 MB)" in shown


def test_zeros_and_integers_of_the_recipe_are_there_without_data(quick):
    model = random_model("llama-1b", None)
    steps = without_data("llm-int4-50", model, DEFAULTS | {"group_size": 64})
    for step in steps:
        prune(model, recipe=step)
    proj = model.model.layers[0].mlp.down_proj
    assert float((proj.weight == 0).float().mean()) >= 0.5
    codes = proj.weight.view(128, 3, 64) / proj.zeroskip_scales.float().view(128, 3, 1)
    torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
    assert int(codes.round().abs().max()) <= 8
    head = model.lm_head.zeroskip_scales
    whole = model.lm_head.weight.view(96, 2, 64) / head.float().view(96, 2, 1)
    assert 8 < int(whole.round().abs().max()) <= 128


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_has_a_form_without_data(quick, name):
    model = random_model("llama-1b", 1)
    for step in without_data(name, model):
        prune(model, recipe=step)
    zeros = float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean())
    assert zeros >= 0.5 if "50" in name or "8:16" in name else zeros < 0.2


def test_a_shape_has_the_layers_asked_for(quick, tmp_path):
    found = bench_llm(
        Settings(shape="llama-1b", layers=1, recipes=("llm-int8-50",), tokens=(4,), batch=(2,)), tmp_path / "work"
    )
    config = json.loads((tmp_path / "work" / "llm-int8-50" / "config.json").read_text())
    assert config["num_hidden_layers"] == 1 and config["hidden_size"] == 128
    assert len(found.times) == 6 and found.contenders[2].perplexity is None
    assert found.contenders[2].logits_error < llm_make.WRONG and len(found.contenders[2].steps) == 2


def test_a_wrong_model_gets_no_time(quick, tmp_path, monkeypatch):
    def broken(model, tokens, precision, **options):
        compiled = compile_model(model, tokens, precision, **options)
        with torch.no_grad():
            model.model.norm.weight.neg_()
        return compiled

    compile_model = llm_make.compile_model
    monkeypatch.setattr(llm_make, "compile_model", broken)
    settings = Settings(shape="llama-1b", layers=1, recipes=("none",), tokens=(4,), batch=(1,))
    found = bench_llm(settings, tmp_path / "work")
    assert {each.contender for each in found.times} == {"torch fp32", "torch bf16"}
    assert "none has no times: compiled, its logits are off by" in str(found)
    assert found.contenders[2].footprint is None


# Its parts ------------------------------------------------------------------------------------------------------------


def test_a_step_decodes_the_same_again(quick):
    model = random_model("llama-1b", 2).eval()
    with torch.inference_mode():
        ids = prompt(model, 6, 2)
        step = Step(model, ids)
        first = step().logits
        step()
        assert step.cache.get_seq_length() == 8
        step.again()
        assert step.cache.get_seq_length() == 6
        assert torch.equal(step().logits, first)
        whole = model(torch.cat([ids[:1].expand(2, -1), ids[:, -1:]], 1)).logits[:, -1:]
        torch.testing.assert_close(first, whole, atol=1e-4, rtol=1e-4)


def test_a_process_alone_tells_its_stages_and_memory(tmp_path):
    found = llm_models.alone("dense", write_decoder(tmp_path / "dense"), 1, (4, 8))
    assert found.import_s > 0 and found.load_s > 0 and found.first_token_s > 0
    assert found.import_bytes is None or 50e6 < found.import_bytes <= found.peak_bytes
    with pytest.raises(ZeroskipError, match="gone: the process that loads it alone failed"):
        llm_models.alone("gone", tmp_path / "gone", 1, (4, 8))


def test_a_table_shows_what_was_not_measured():
    ours = Contender("none", "ours", "fp32", perplexity={"value": None}, problem="why")
    shown = str(LlmTable("m", "cpu", {}, {"torch": "2"}, [ours], missing={"llama_cpp": "not yet"}))
    assert "inf" in shown and "none has no times: why" in shown and "missing: llama_cpp: not yet" in shown


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "a model directory or a shape"),
        (["--shape", "lama-1b"], "did you mean 'llama-1b'?"),
        (["--shape", "llama-1b", "--layers", "0"], "layers is 0"),
        (["--shape", "llama-1b", "--text", "t.txt"], "no tokenizer"),
        (["--shape", "llama-1b", "--recipes", "llm-int4-5"], "did you mean"),
        (["--shape", "llama-1b", "--recipes", "none,none"], "each once"),
        (["--shape", "llama-1b", "--recipes", ","], "at least one"),
        (["--shape", "llama-1b", "--tokens", "8,x"], "whole numbers"),
        (["--shape", "llama-1b", "--tokens", "9999"], "9999"),
        (["--shape", "llama-1b", "--batch", "0"], "at least 1"),
        (["--shape", "llama-1b", "--threads", "0"], "at least 1"),
        (["--shape", "llama-1b", "--dtype", "fp16"], "unknown dtype 'fp16'"),
        (["--shape", "llama-1b", "--race", "0"], "race_s is 0"),
        (["--shape", "llama-1b", "--peers", "lama_cpp"], "did you mean 'llama_cpp'?"),
        (["--model", "nowhere"], "no such model directory"),
        (["--model", ".", "--calibration", "nowhere.txt"], "--calibration nowhere.txt: no such file"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(words, told):
    assert told in refused("bench", "llm", *words)


def test_models_that_are_not_causal_or_have_no_room_are_refused(quick, endless, tmp_path):
    encoder = write_encoder(tmp_path / "encoder")
    work = tmp_path / "work"
    told = refused("bench", "llm", "--model", encoder, "--tokens", "8", "--work", work)
    assert "no causal language model" in told and not work.exists()
    assert "knows 128 positions" in refused("bench", "llm", "--model", endless, "--tokens", "121")
    assert "not an empty directory" in refused("bench", "llm", "--model", endless, "--tokens", "8", "--work", tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("read the file")
    told = refused("bench", "llm", "--model", endless, "--tokens", "8", "--text", text, "--context", "500")
    assert "context is 500" in told
    for file in endless.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in refused("bench", "llm", "--model", endless, "--tokens", "8", "--text", text)


# The profile ----------------------------------------------------------------------------------------------------------


def test_a_step_is_taken_apart(quick):
    model = random_model("llama-1b", 2).eval()
    told = llm_profile.profile_step("m", model, prompt(model, 6, 1))
    assert told.calls == 2 * 7 + 1 and told.tokens == 6 and told.compiled_ms is None
    assert 0 < told.kernels_ms < told.step_ms and 0 < told.attention_ms < told.step_ms
    assert told.rest_ms == pytest.approx(told.step_ms - told.kernels_ms - told.attention_ms)
    packed = copy.deepcopy(model)
    packed.lm_head = PackedLinear.from_packed(zs.pack(model.lm_head.weight.data, "dense", "int8"))
    assert llm_profile.profile_step("m", packed, prompt(model, 6, 1)).calls == 2 * 7 + 1
    shown = "\n".join(profile_table([told, replace(told, compiled_ms=1.0)]))
    assert "generate ms" in shown and "1.00" in shown
    assert torch.nn.functional.linear.__name__ == "linear"  # nothing stays watched
