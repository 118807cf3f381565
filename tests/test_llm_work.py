"""What a benchmark of language models makes once, and what its figures come to."""

import json
from types import SimpleNamespace

import pytest
import torch
from cli_models import cli, refused, shorten_races, write_endless

from zeroskip.bench import llm, llm_make, llm_models
from zeroskip.bench.llm_products import added, measure_products, products_table, shapes_of
from zeroskip.bench.llm_results import Contender, Timing
from zeroskip.bench.llm_summary import bits_of, summary, summary_table
from zeroskip.bench.llm_work import Work
from zeroskip.bench.results import Row, Spread
from zeroskip.bench.timer import Race, Ratio
from zeroskip.errors import ZeroskipError
from zeroskip.planning.plan import plan_of

ABOUT = {"model": None, "shape": "llama-1b", "layers": 2, "dtype": "fp32"}


def test_a_folder_is_gone_on_with_only_if_its_models_are_those_asked_for(tmp_path):
    work = Work(tmp_path / "work", ABOUT)
    assert work.model("a", {}) is None and work.peer("llama_cpp") is None
    work.place("a").mkdir()
    work.add_model("a", {"include": ("x",)}, [{"method": "rtn"}])
    work.add_peer("llama_cpp", {"q4_0": 7})
    again = Work(tmp_path / "work", ABOUT)
    assert again.model("a", {"include": ["x"]}) == [{"method": "rtn"}] and again.peer("llama_cpp") == {"q4_0": 7}
    assert again.model("b", {"include": ["x"]}) is None
    assert again.model("a", {"include": ["x"], "group_size": 128}) is None, "something else is asked for"
    again.cleared("a")
    assert again.model("a", {"include": ["x"]}) is None, "the model is gone"
    with pytest.raises(ZeroskipError, match="holds models of layers 2 and not 4: name another directory"):
        Work(tmp_path / "work", ABOUT | {"layers": 4})
    (tmp_path / "work" / "made.json").write_text("{")
    with pytest.raises(ZeroskipError, match=r"made.json: cannot be read .*: remove the directory"):
        Work(tmp_path / "work", ABOUT)
    with pytest.raises(ZeroskipError, match="not an empty directory"):
        Work(tmp_path, ABOUT)


def test_what_is_made_beforehand_is_not_made_again(tmp_path, monkeypatch):
    shorten_races(monkeypatch)
    monkeypatch.setattr(llm, "alone", lambda *about: None)
    monkeypatch.setenv("ZEROSKIP_PEERS", "none/here")
    model, work, out = write_endless(tmp_path / "dense", context=128), tmp_path / "work", tmp_path / "out.json"
    words = ["bench", "llm", "--model", model, "--recipes", "llm-int4-50", "--tokens", "8", "--batch", "1,4"]
    words += ["--dense", "", "--threads", "1", "--race", "0.02", "--work", work, "--embeddings", "int4"]
    words += ["--group-size", 128]
    made = cli(*words, "--make-only")
    assert made.exit_code == 0 and f"made in {work}; next: the same command" in made.stdout
    assert "missing: llama_cpp: not installed" in made.stdout
    before = (work / "llm-int4-50 pruned" / "model.safetensors").stat().st_mtime_ns
    compiled = []
    for prefer in ("bytes", "bytes", "speed", "bytes"):
        done = cli(*words, "--prefer", prefer, "--products", "--json", out)
        assert done.exit_code == 0, done.output
        compiled.append((work / "llm-int4-50" / "model.safetensors").stat().st_mtime_ns)
    assert compiled[0] == compiled[1] and len(set(compiled)) == 3
    assert (work / "llm-int4-50 pruned" / "model.safetensors").stat().st_mtime_ns == before
    told = json.loads(out.read_text())
    assert told["settings"]["prefer"] == "bytes" and told["contenders"][0]["layers"]
    assert any(rule.get("values") == "int4" for rule in told["contenders"][0]["steps"][1]["rules"])
    assert {each["layout"] for each in told["products"]["found"]} >= {"dense int4", "bitmask int4"}
    assert "4 sequences over 1" in done.stdout and "linear layers alone" in done.stdout
    assert all(step.get("group_size", 128) == 128 for step in told["contenders"][0]["steps"])
    assert cli(*words[:-4], "--make-only").exit_code == 0
    changed = (work / "llm-int4-50 pruned" / "model.safetensors").stat().st_mtime_ns
    assert changed != before, "embeddings of 8 bits, in other groups"
    assert "holds models of dtype 'fp32' and not 'bf16'" in refused(*words, "--dtype", "bf16")


@pytest.mark.parametrize(("recipe", "values"), [("llm-bf16-8:16@64", "bf16"), ("llm-int8-50", "int8")])
def test_what_is_compiled_competes_in_the_precision_of_its_recipe(tmp_path, monkeypatch, recipe, values):
    shorten_races(monkeypatch)
    monkeypatch.setattr(llm_make, "random_model", lambda *about: llm_models_tiny())
    settings = llm.Settings(shape="llama-1b", layers=1, recipes=(recipe,), tokens=(4,), prefer="bytes")
    seen = []
    compile_model = llm_make.compile_model
    monkeypatch.setattr(llm_make, "compile_model", lambda *a, **k: seen.append(compile_model(*a, **k)))
    one = llm_make.Maker(settings, Work(tmp_path / "work", {}), None).compiled(recipe)
    assert one.dtype == "fp32" and one.logits_error < llm_make.WRONG
    raced = [site.times_ms for site in plan_of(seen[0]).sites if site.times_ms]
    assert len(raced) == 8, "seven layers and the head"
    assert all(any(values in layout for layout in times) for times in raced)


def test_only_what_is_kept_is_made_beforehand(tmp_path):
    model = write_endless(tmp_path / "dense", context=128)
    assert "--make-only needs --work DIR" in refused("bench", "llm", "--model", model, "--make-only")


def test_pruned_models_are_stored_as_their_source_is(tmp_path, monkeypatch):
    monkeypatch.setattr(llm_make, "random_model", lambda *about: llm_models_tiny())
    settings = llm.Settings(shape="llama-1b", layers=1, recipes=("llm-int4-50",), tokens=(4,))
    maker = llm_make.Maker(settings, Work(tmp_path / "work", {}), None)
    model, steps = maker.pruned("llm-int4-50")
    assert model.dtype == torch.bfloat16 and len(steps) == 2
    again, known = maker.pruned("llm-int4-50")
    assert known == steps
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    dense = maker.source(torch.float32).model.layers[0].mlp.up_proj.weight
    assert float((dense == 0).float().mean()) < 0.01
    assert float((again.model.layers[0].mlp.up_proj.weight == 0).float().mean()) >= 0.5


def llm_models_tiny():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "vocab_size": 96}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=64))


# Rows of one prompt ---------------------------------------------------------------------------------------------------


def test_prompts_differ_in_their_last_token_only():
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=1000)))
    ids = llm_models.prompt(model, 6, 5)
    assert ids.shape == (5, 6) and len(set(ids[:, -1].tolist())) > 3
    assert (ids[:, :-1] == ids[0, :-1]).all()
    assert torch.equal(ids, llm_models.prompt(model, 6, 5)) and not torch.equal(ids, llm_models.prompt(model, 7, 5))


def test_rivals_far_behind_read_no_long_prompt():
    rivals = [SimpleNamespace(contender=Contender(name, "rival", name)) for name in ("a", "b", "c")]
    seen = Race({"ours": [0.1], "a": [1.0], "b": [1.2], "c": [1.4]})
    assert [each.contender.name for each in llm.leading(rivals, seen)] == ["a", "b"]
    assert llm.leading([], seen) == []


# What it comes to -----------------------------------------------------------------------------------------------------


def timing(what, batch, name, ms, faster=None):
    ratios = {other: Ratio(value, value / 2, value * 2) for other, value in (faster or {}).items()}
    return Timing(what, 128, batch, 2, name, ms, 7, 1e3 * batch / ms, ratios)


def test_each_of_ours_meets_the_best_of_its_rivals():
    contenders = [
        Contender("torch fp32", "rival", "fp32", memory_bytes=400),
        Contender("four", "ours", "fp32", memory_bytes=80),
        Contender("peer q4_0", "rival", "q4_0", memory_bytes=100),
        Contender("peer q4_k_m plain", "rival", "q4_k_m plain", memory_bytes=110),
        Contender("peer q8_0", "rival", "q8_0", memory_bytes=190),
    ]
    slow = {"peer q4_0": 1.5, "peer q4_k_m plain": 1.2, "peer q8_0": 3.0, "torch fp32": 9.0}
    times = [
        timing("decode", 1, "four", 10.0, slow),
        timing("decode", 1, "peer q4_0", 15.0),
        timing("decode", 1, "peer q4_k_m plain", 12.0),
        timing("decode", 1, "peer q8_0", 30.0),
        timing("decode", 1, "torch fp32", 9.0),
        timing("decode", 16, "four", 20.0),
        timing("first token", 1, "four", 50.0, {"peer q8_0": 0.5}),
        timing("first token", 1, "peer q8_0", 25.0),
    ]
    lines = {(line.what, line.against, line.rival): line.ratio for line in summary(contenders, times)}
    assert lines.pop(("decode, 1 sequences", "best 4-bit", "peer q4_k_m plain")) == Ratio(1.2, 0.6, 2.4)
    assert lines.pop(("decode, 1 sequences", "best 8-bit", "peer q8_0")).value == 3.0
    assert lines.pop(("first token after 128", "best", "peer q8_0")).value == 0.5
    assert lines.pop(("16 sequences over 1", "itself", "four")).value == pytest.approx(8.0)
    assert lines.pop(("weights", "bytes", "peer q4_0")).value == 0.8
    assert {rival for _, _, rival in lines} == {"peer q8_0"}, "of the plain ones the bytes are the same"
    shown = "\n".join(summary_table(summary(contenders, times)))
    assert "1.20 (0.60-2.40)" in shown and "0.800" in shown
    assert [bits_of(name) for name in ("q4_0", "q4_k_m plain", "q8_0", "bf16")] == [4, 4, 8, 16]


def row(m, layout, ms, sparsity=0.5, **faster):
    spreads = {name: Spread(value, value / 2, value * 2) for name, value in faster.items()}
    about = ("case", "", m, 64, "unstructured", sparsity, 1, 2)
    role = "ours" if faster else "peer"
    return Row(*about, role, layout, "bitmask", "int4", False, "k", m, ms, faster_than=spreads)


def test_times_of_all_layers_are_added_up():
    shapes = {(10, 64): 4, (30, 64): 1}
    rows = [row(10, "a", 1.0, b=2.0), row(10, "b", 2.0), row(30, "a", 6.0, b=0.5), row(30, "b", 3.0)]
    a, b = sorted(added(shapes, [*rows, row(10, "c", 1.0)]), key=lambda each: each.layout)
    assert (a.ms, b.ms, a.nbytes) == (10.0, 11.0, 70)
    assert a.faster_than == {"b": Spread(pytest.approx(1.1), pytest.approx(0.55), pytest.approx(2.2))}
    assert not b.faster_than


def test_linear_layers_are_raced_alone(monkeypatch):
    model = llm_models_tiny()
    shapes = shapes_of(model)
    assert shapes == {(128, 128): 2, (64, 128): 2, (192, 128): 2, (128, 192): 1}
    told = measure_products({(64, 128): 2, (128, 192): 1}, ["llama_cpp"], (1, 8), (1,), 0.01)
    assert {(each.tokens, each.layout) for each in told.found} == {
        (tokens, layout) for tokens in (1, 8) for layout in ("dense int4", "bitmask int4")
    }
    for each in told.found:
        assert each.ms > 0 and ("dense int4" in each.faster_than) == (each.layout != "dense int4")
    assert len(told.break_evens) == 1 and told.break_evens[0].startswith("1 threads, 1 tokens: ")
    assert not told.missing, "llama.cpp runs whole models, and is compared there"
    assert "break-even, 1 threads, 1 tokens: " in "\n".join(products_table(told))
