"""Recipes compared on a dense model: what each takes, which is recommended and why; times are injected."""

import json
import shutil

import pytest
import torch
from cli_models import cli, refused
from planning import inject, prefer
from tiny_models import llama

import zeroskip as zs
from zeroskip.compare import Compared, Comparison, advise
from zeroskip.errors import ZeroskipError
from zeroskip.planning.machine import this_machine
from zeroskip.planning.tokens import Tokens
from zeroskip.prune import recipes


def test_every_recipe_is_measured_and_the_model_left_alone(monkeypatch):
    inject(monkeypatch, prefer("dense int4", "dense int8"))
    model = llama(torch.bfloat16, layers=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told = []
    found = zs.compare(model, tokens=(1, 8), progress=lambda *one: told.append(one))
    assert {one.recipe for one in found.recipes} == set(recipes()) and found.recipes[0].recipe == "none"
    by_name = {one.recipe: one for one in found.recipes}
    assert by_name["none"].layouts == {"linear bf16": 7} and by_name["none"].gains == {1: 1.0, 8: 1.0}
    assert by_name["llm-int4-50"].layouts == by_name["llm-int4-dense"].layouts == {"dense int4": 7}
    assert by_name["llm-int8-dense"].layouts == {"dense int8": 7}
    assert by_name["llm-int4-50"].gains[1] == pytest.approx(10.0)
    assert by_name["llm-int4-50"].ms[1] == pytest.approx(7 * 100.0)
    assert by_name["none"].nbytes == sum({id(p): p.nbytes for p in model.parameters()}.values())
    assert by_name["llm-int4-dense"].nbytes < by_name["llm-int8-dense"].nbytes
    assert all(one.perplexity is None for one in found.recipes)
    assert found.best == "llm-int4-50" and "give text" in found.advice
    assert "llm-int4-50*" in str(found) and json.loads(json.dumps(found.to_dict()))["best"] == "llm-int4-50"
    assert told[0] == (0, 6, "none") and told[-1] == (6, 6, "")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "zeroskip_report")


def given(**recipes):
    """A comparison of {name: (MB, ms at 1, gain at 1, perplexity)}."""
    rows = [
        Compared(name.replace("_", "-"), int(mb * 1e6), {1: ms}, {1: x}, {}, ppl)
        for name, (mb, ms, x, ppl) in recipes.items()
    ]
    return Comparison(this_machine(), Tokens.parse((1,)), recipes=rows)


DENSE = (100, 10.0, 1.0, 20.0)


@pytest.mark.parametrize(
    ("recipes", "best", "said"),
    [
        ({"a": (50, 5.0, 2.0, 20.5), "b": (40, 2.5, 4.0, 25.0)}, "a", "Take a: 50% of the bytes, linear layers 2.00x"),
        ({"a": (50, 5.0, 2.0, 20.5), "b": (40, 5.05, 1.98, 21.0)}, "b", "40% of the bytes"),  # as fast, and smaller
        ({"a": (50, 5.0, 2.0, 30.0), "b": (40, 2.5, 4.0, 25.0)}, None, "the nearest is b with 25.00 against 20.00"),
        ({"a": (100, 10.0, 1.0, 20.0)}, None, "Keep it dense: no recipe makes"),
        ({"a": (60, 10.0, 1.0, 20.0)}, "a", "60% of the bytes"),  # no faster, but smaller
        ({"a": (50, 5.0, 2.0, None)}, None, "Keep it dense: every recipe"),  # its perplexity was infinite
    ],
)
def test_advice(recipes, best, said):
    found = advise(given(none=DENSE, **recipes))
    assert found[0] == best and said in found[1]


def test_a_recipe_that_does_not_fit_is_said_to():
    found = given(none=DENSE, a=(50, 5.0, 2.0, 20.0))
    found.recipes.append(Compared("b", problem="it has no strips"))
    assert advise(found)[0] == "a" and "it has no strips" in str(found)
    found.recipes = [found.recipes[0], found.recipes[2]]
    assert advise(found) == (None, "No recipe fits this model: nothing in it can be packed.")


def test_what_cannot_be_compared(monkeypatch):
    with pytest.raises(ZeroskipError, match="did you mean 'llm-int4-50'"):
        zs.compare(llama(), ["llm-int4-5"])
    with pytest.raises(ZeroskipError, match="needs text="):
        zs.compare(llama(), eval_text="a.txt")
    with pytest.raises(ZeroskipError, match="needs tokenizer="):
        zs.compare(llama(), text="a.txt")
    inject(monkeypatch, prefer("dense fp32"))
    with pytest.raises(ZeroskipError, match="compiled: compare recipes on the dense one"):
        zs.compare(zs.compile(llama(), tokens=1))


@pytest.mark.usefixtures("short_races")
def test_the_command_measures_perplexity_too(decoder, text, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(decoder, half)
    zs.load(decoder).bfloat16().save_pretrained(half)
    names = "llm-int8-dense,llm-int4-50"
    asked = ("--recipes", names, "--text", text, "--eval-text", text, "--tokens", 1, "--json", tmp_path / "out.json")
    result = cli("analyze", half, *asked)
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    scores = {one["recipe"]: one["perplexity"] for one in found["recipes"]}
    assert list(scores) == ["none", "llm-int8-dense", "llm-int4-50"] and len(set(scores.values())) == 3
    assert {layout.split()[1] for layout in found["recipes"][0]["layouts"]} == {"bf16"}, "timed as it is stored"
    assert scores["llm-int8-dense"] == pytest.approx(scores["none"], rel=0.02)
    assert "perplexity on all of sentences.txt" in result.stdout and found["advice"].split(":")[0] in result.stdout


def test_options_that_go_with_recipes_only(encoder, decoder, text):
    assert "give --recipes all" in refused("analyze", decoder, "--text", text)
    assert "--eval-text needs --text" in refused("analyze", decoder, "--recipes", "all", "--eval-text", text)
    assert "leave one out" in refused("analyze", decoder, "--recipes", "all", "--precision", "int8")
    assert "did you mean 'none'" in refused("analyze", decoder, "--recipes", "nine")
    assert "no causal language model" in refused("analyze", encoder, "--recipes", "all", "--text", text)
