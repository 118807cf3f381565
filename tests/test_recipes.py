"""Recipes: which layer gets what, from a dict, a file or a name; and the same bits again from what was saved."""

import json

import pytest
import torch
from cli_models import cli, refused
from safetensors.torch import load_file
from tiny_models import MODELS, batches, bert, llama

import zeroskip as zs
from zeroskip.prune import Recipe, prune, recipes
from zeroskip.prune.recipe import DEFAULTS

LAYERS = [f"model.layers.{i}" for i in range(3)]


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def rows(model, recipe, **more):
    report = prune(model, recipe=recipe, **more)
    return {row.name: row for row in report.rows}, report


MIXED = {
    "method": "wanda+ls",
    "sparsity": 0.5,
    "seed": 3,
    "rules": [
        {"include": "*.mlp.*", "pattern": "2:4@16"},
        {"include": "*.down_proj", "exclude": "model.layers.0.*", "method": "sparsegpt+gptq", "group_size": 32},
        {"include": "re:.*\\.1\\..*_proj", "dense": True},
        {"include": ["model.layers.1.mlp.up_proj"], "method": "magnitude", "sparsity": 0.25, "pattern": "unstructured"},
        {"include": "lm_head", "method": "rtn", "values": "int8"},
    ],
}


def test_rules_change_what_they_name_and_the_last_one_wins():
    model = llama()
    found, report = rows(model, MIXED, calibration=batches("llama", 2))
    assert found["model.layers.0.self_attn.q_proj"].pattern == "unstructured"
    for name, pattern, zeros in (
        ("model.layers.0.self_attn.q_proj", "unstructured", 0.5),
        ("model.layers.0.mlp.down_proj", "2:4@16", 0.5),
        ("model.layers.2.mlp.up_proj", "2:4@16", 0.5),
        ("model.layers.1.mlp.up_proj", "unstructured", 0.25),
    ):
        weight = model.get_submodule(name).weight
        assert found[name].pattern == pattern and float((weight == 0).float().mean()) == zeros
        assert not hasattr(model.get_submodule(name), "zeroskip_scales")
    joint = model.model.layers[2].mlp.down_proj  # the pattern stays that of the rule before
    assert joint.zeroskip_scales.shape == (1, 32, 2) and float((joint.weight == 0).float().mean()) >= 0.5
    groups = joint.weight.detach().view(2, 16, -1, 4).abs().sum(1).ne(0).sum(2)
    assert int(groups.max()) <= 2
    dense = {name for name in found if name.startswith(LAYERS[1])}
    assert dense == {"model.layers.1.mlp.up_proj"}
    assert report.skipped["model.layers.1.mlp.gate_proj"] == "left dense by rule 3"
    assert found["lm_head"].sparsity_asked == 0 and model.lm_head.zeroskip_scales.shape == (1, 96, 1)


def test_sites_without_a_rule_are_pruned_as_without_a_recipe():
    """Rules for later layers leave earlier ones alone, to the bit."""
    plain, ruled = llama(), llama()
    prune(plain, sparsity=0.5, calibration=batches("llama", 2), include="model.layers.0.*")
    rule = {"include": ["model.layers.1.*", "model.layers.2.*"], "method": "magnitude"}
    prune(ruled, recipe={"sparsity": 0.5, "rules": [rule]}, calibration=batches("llama", 2))
    for name, value in plain.model.layers[0].state_dict().items():
        assert torch.equal(value, ruled.model.layers[0].state_dict()[name])
    up = llama().model.layers[2].mlp.up_proj.weight
    kept = ruled.model.layers[2].mlp.up_proj.weight
    assert torch.equal(kept[kept != 0], up[kept != 0]) and int((kept == 0).sum()) == kept.numel() // 2


def test_methods_that_need_no_data_prune_lists_whose_blocks_are_not_reached():
    """In a mixed recipe a layer behind the last calibrated one is pruned too."""
    model = llama()
    recipe = {"method": "magnitude", "sparsity": 0.5, "rules": [{"include": "model.layers.0.*", "method": "wanda"}]}
    found, _ = rows(model, recipe, calibration=batches("llama", 1))
    assert len(found) == 21 and found["model.layers.0.mlp.up_proj"].tokens == 41


def test_embeddings_are_rounded_before_the_blocks_see_them():
    def model():
        made = llama()
        made.lm_head.weight = torch.nn.Parameter(made.lm_head.weight.detach().clone() * 2)
        return made

    rounded, by_hand = model(), model()
    rules = [{"include": ["embed_tokens", "lm_head"], "method": "rtn", "values": "int4"}]
    found, _ = rows(rounded, {"method": "wanda", "sparsity": 0.5, "rules": rules}, calibration=batches("llama", 1))
    assert len(found) == 23
    prune(by_hand, "rtn", values="int4", include=["embed_tokens", "lm_head"], exclude=None)
    prune(by_hand, "wanda", sparsity=0.5, calibration=batches("llama", 1))
    assert same(bits(rounded), bits(by_hand))
    plain = model()
    prune(plain, "wanda", sparsity=0.5, calibration=batches("llama", 1))
    assert not torch.equal(plain.model.layers[0].mlp.up_proj.weight, rounded.model.layers[0].mlp.up_proj.weight)


def test_layers_that_share_a_weight_are_pruned_once():
    model = llama()
    rule = {"include": ["embed_tokens", "lm_head"], "method": "rtn", "values": "int8"}
    found, report = rows(model, {"method": "magnitude", "sparsity": 0.5, "rules": [rule]})
    assert "lm_head" in found and "model.embed_tokens" not in found
    assert report.skipped["model.embed_tokens"] == "shares its weight with lm_head, which is pruned"
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tuning_only_where_it_is_asked_for():
    model, before = llama(), bits(llama())
    rule = {"include": "*.mlp.*", "method": "wanda+ls+tune"}
    found, _ = rows(model, {"method": "magnitude", "sparsity": 0.5, "rules": [rule]}, calibration=batches("llama", 2))
    for name in found:
        weight = model.get_submodule(name).weight
        moved = not torch.equal(weight[weight != 0], before[f"{name}.weight"][weight != 0])
        assert moved == (".mlp." in name)


def test_surveys_see_what_each_layer_is_asked(monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules["zeroskip.prune.synflow"], "ROUNDS", 3)
    model = llama()
    recipe = {
        "method": "synflow",
        "sparsity": 0.5,
        "rules": [
            {"include": "*.mlp.*", "pattern": "2:4"},
            {"include": "*.o_proj", "sparsity": 0.75},
            {"include": "*.k_proj", "method": "snip"},
        ],
    }
    found, _ = rows(model, recipe, calibration=batches("llama", 1))
    assert len(found) == 21
    for name, row in found.items():
        assert row.sparsity == (0.75 if name.endswith("o_proj") else 0.5)


@pytest.mark.parametrize("journal", [False, True])
def test_what_is_saved_reproduces_the_run(tmp_path, journal):
    first, again = llama(), llama()
    more = {"calibration": batches("llama", 2)} | ({"journal": tmp_path / "journal"} if journal else {})
    prune(first, recipe=MIXED, **more)
    zs.save(first, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "zeroskip.json").read_text())["recipe"]
    if journal:
        for index in (0, 3):
            (tmp_path / "journal" / f"{index:05d}.safetensors").unlink()
    report = prune(again, recipe=saved, **more)
    assert same(bits(first), bits(again)) and report.recipe == saved
    for one, two in zip(first.modules(), again.modules(), strict=True):
        if hasattr(one, "zeroskip_scales"):
            assert torch.equal(one.zeroskip_scales, two.zeroskip_scales)
    assert (tmp_path / "out").is_dir() and recipe_of(saved) == recipe_of(MIXED | {"include": None})


def recipe_of(given):
    read = Recipe.read(DEFAULTS, given)
    names = [f"{layer}.{part}" for layer in LAYERS for part in ("mlp.up_proj", "self_attn.q_proj")]
    return [read.settings(name).settings is None for name in names]


def test_a_file_says_the_same_as_a_dict(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        """\
# Patterns such as 2:4 are text here, as in YAML 1.2.
method: magnitude
sparsity: 5e-1
rules:
  - include: ["*.mlp.*", q_proj]
    pattern: 2:4
  - {include: lm_head, method: rtn, values: int8, group_size: 32}
"""
    )
    one, two = llama(), llama()
    rule = {"include": ["*.mlp.*", "q_proj"], "pattern": "2:4"}
    head = {"include": "lm_head", "method": "rtn", "values": "int8", "group_size": 32}
    prune(one, recipe=path)
    prune(two, recipe={"method": "magnitude", "sparsity": 0.5, "rules": [rule, head]})
    assert same(bits(one), bits(two)) and one.zeroskip_report.recipe == two.zeroskip_report.recipe


def test_arguments_complete_a_recipe():
    one, two = llama(), llama()
    prune(one, sparsity=0.25, seed=7, recipe={"method": "random"})
    prune(two, "random", sparsity=0.25, seed=7)
    assert same(bits(one), bits(two))


@pytest.mark.parametrize("name", recipes())
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_recipe_of_the_package_runs(name, kind):
    model, before = MODELS[kind](), bits(MODELS[kind]())
    found, report = rows(model, name, calibration=batches(kind, 1))
    if name == "none":
        assert same(before, bits(model)) and not found and "left dense by the recipe" in str(report)
        return
    assert "lm_head" in found or "8:16" in name
    blocks = [row for row in found.values() if row.name != "lm_head" and row.tokens]
    assert len(blocks) == {"llama": 21, "gpt2": 8}[kind]
    half = "50" in name or "8:16" in name
    assert all((row.sparsity >= 0.5) == half for row in blocks)
    assert all(
        (model.get_submodule(row.name).__dict__.get("zeroskip_scales") is not None) == ("int" in name) for row in blocks
    )
    if "int" in name:  # at 8 bits, by its own scales
        scales = model.lm_head.zeroskip_scales[0].float()
        codes = model.lm_head.weight.detach() / scales.repeat_interleave(64, 1)[:, : model.lm_head.weight.shape[1]]
        assert float((codes - codes.round()).abs().max()) < 1e-3 and float(codes.abs().max()) > 7.5


def test_the_packages_recipes_are_those_that_are_documented():
    assert {"none", "llm-int4-50", "llm-int8-50", "llm-int4-dense", "llm-int8-dense", "llm-bf16-8:16@64"} <= set(
        recipes()
    )


def test_rounding_without_data_keeps_zeros_and_is_the_nearest():
    model = bert()
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[:, ::3] = 0
    before = bits(model)
    report = prune(model, "rtn", values="int4", group_size=32)
    for row in report.rows:
        module = model.get_submodule(row.name)
        old, new = before[f"{row.name}.weight"], module.weight.detach()
        step = module.zeroskip_scales[0].float().repeat_interleave(32, 1)[:, : old.shape[1]]
        assert torch.equal(new[old == 0], old[old == 0]) and not torch.signbit(new[new == 0]).any()
        inside = old.abs() <= 7 * step
        assert ((new - old).abs()[inside] <= 0.5001 * step[inside]).all()
        full = old.abs().view(len(old), -1, 32).amax(2) / 7
        assert ((new - old).square().sum()) <= (
            (old / full.repeat_interleave(32, 1)).round() * full.repeat_interleave(32, 1) - old
        ).square().sum() * 1.01


def test_the_command_line_takes_a_recipe_and_the_directory_it_wrote(decoder, text, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("method: wanda+ls\nsparsity: 0.5\nrules: [{include: '*.mlp.*', pattern: 2:4}]\n")
    for out, recipe in (("one", path), ("two", tmp_path / "one")):
        result = cli("prune", decoder, tmp_path / out, "--recipe", recipe, "--text", text, "--no-speed")
        assert result.exit_code == 0, result.output
    one, two = (
        {name: value for path in (tmp_path / out).glob("*.safetensors") for name, value in load_file(path).items()}
        for out in ("one", "two")
    )
    assert one and one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    result = cli("prune", decoder, tmp_path / "three", "--recipe", "none", "--no-speed")
    assert result.exit_code == 0, result.output
    words = ("--method", "magnitude", "--budget", "arithmetic", "--target", "params=40%")
    result = cli("prune", decoder, tmp_path / "four", *words, "--no-speed", "--json", tmp_path / "four.json")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "four.json").read_text())
    assert report["recipe"]["budget"] == "arithmetic" and report["recipe"]["target"] == {"params": "40%"}
    assert report["sparsity"] == pytest.approx(0.6, abs=1e-4)


def test_the_command_line_refuses_what_contradicts(decoder, tmp_path):
    out = tmp_path / "out"
    assert "method is 'wanda', and 'admm+gptq+cd+ls' in the recipe" in refused(
        "prune", decoder, out, "--recipe", "llm-int4-50", "--method", "wanda"
    )
    assert "needs data: give --text FILE" in refused("prune", decoder, out, "--recipe", "llm-int8-dense")
    assert "did you mean 'llm-int8-50'" in refused("prune", decoder, out, "--recipe", "llm-int8-5")
    path = tmp_path / "mine.yaml"
    path.write_text("method: magnitude\nsparsity: 0.5\nrules: [{include: q_porj, dense: true}]\n")
    assert "rule 1 names no layer: q_porj" in refused("prune", decoder, out, "--recipe", path)
    assert "give UNIT=AMOUNT" in refused("prune", decoder, out, "--target", "ms")
    assert "each key once" in refused("prune", decoder, out, "--target", "ms=1,ms=2")
    assert "did you mean 'ms'" in refused("prune", decoder, out, "--target", "m=1")
    assert "did you mean 'owl'" in refused("prune", decoder, out, "--budget", "owel", "--sparsity", 0.5)
    path.write_text("method: magnitude\nsparsty: 0.5\n")
    assert "did you mean 'sparsity'" in refused("prune", decoder, out, "--recipe", path)
    assert not out.exists()
