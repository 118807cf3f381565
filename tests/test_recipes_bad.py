"""Recipes that are wrong: one line that says where, and nothing changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import batches, llama

from zeroskip.errors import ZeroskipError
from zeroskip.prune import Recipe, prune
from zeroskip.prune.recipe import DEFAULTS

HALF = {"method": "magnitude", "sparsity": 0.5}


def rule(*rules, **top):
    return HALF | top | {"rules": list(rules)}


WRONG = [
    ({"sparcity": 0.5}, r"recipe has an unknown entry 'sparcity' \(did you mean 'sparsity'\?\)"),
    (rule({"inclde": "*", "dense": True}), r"rule 1 has an unknown entry 'inclde' \(did you mean 'include'\?\)"),
    (rule({"include": "q_proj", "dense": True}, {"include": "q_porj", "dense": True}), "rule 2 names no layer: q_porj"),
    (rule({"include": "layers.9.*", "sparsity": 0.1}), r"rule 1 names no layer: layers\.9\.\* \(known: model"),
    (rule({"include": "q_proj", "exclude": "*.self_attn.*", "sparsity": 0.1}), "rule 1 names no layer"),
    (
        rule({"include": "*head", "sparsity": 0.1}),
        r"names only layers that are left out: lm_head \(excluded by 'lm_head'",
    ),
    (rule({"include": "*"}), "rule 1 changes nothing: give one of dense, method"),
    (rule({"dense": True}), "rule 1 does not say for which layers"),
    (rule({"include": "*", "dense": True, "sparsity": 0.5}), "leaves its layers dense, and gives them a sparsity"),
    (rule({"include": "*", "dense": "yes"}), "dense is 'yes': give true or false"),
    (rule({"include": "*", "optional": 1, "sparsity": 0.5}), "optional is 1"),
    (rule({"include": 3, "dense": True}), "rule 1: include is 3: give globs"),
    (rule({"include": "re:(", "dense": True}), "rule 1: include 're:\\(' is not a regular expression"),
    (rule({"include": "*", "method": "wnada"}), r"rule 1: unknown method 'wnada' \(did you mean 'wanda'"),
    (rule({"include": "*", "method": ["wanda"]}), "rule 1: unknown method"),
    (rule({"include": "*", "pattern": 124}), "rule 1: pattern is 124: give a string"),
    (rule({"include": "*", "sparsity": True}), "rule 1: sparsity is True"),
    (rule({"include": "*", "sparsity": "half"}), r"rule 1: sparsity is 'half'.*for model\.layers\.0"),
    (rule({"include": "*", "values": "int4"}), "rule 1: method 'magnitude' does not quantise"),
    (rule({"include": "*", "method": "rtn", "sparsity": 0.5}), "rule 1: method 'rtn' keeps the zeros that are there"),
    (rule({"include": "*", "method": "fista", "pattern": "2:4@16"}), "rule 1: method 'fista' cannot serve"),
    (rule({"include": "*", "method": "rtn", "group_size": [64]}), r"rule 1: group_size is \[64\]"),
    (rule({"include": "*", "method": "rtn", "values": ["int4"]}), r"rule 1: unknown integer type \['int4'\]"),
    (
        rule({"include": "*", "pattern": "2:4"}, {"include": "q_proj", "sparsity": 0.7}),
        "rule 1 and rule 2: pattern '2:4' has",
    ),
    (rule({"include": "*", "pattern": "3:5"}), "32 inputs are not a multiple of 5"),
    (
        rule({"include": "q_proj", "dense": True}, {"include": "*", "sparsity": 0.7}),
        "rule 1 has no effect: later rules",
    ),
    (rule({"include": "*", "sparsity": 0.6}, {"include": "*", "sparsity": 0.7}), "rule 1 has no effect"),
    (rule({"include": "*", "dense": True}), "nothing to prune: the rules leave every layer dense"),
    (
        rule({"include": ["lm_head", "embed_tokens"], "method": "rtn"}, {"include": "lm_head", "values": "int8"}),
        "share one weight: the recipe must ask the same of both",
    ),
    ({"dense": True, "sparsity": 0.5}, "leaves all layers dense: leave sparsity out"),
    ({"dense": "true"}, "dense is 'true'"),
    (HALF | {"rules": {"include": "*"}}, "rules is a dict: give a list"),
    (HALF | {"rules": ["*"]}, "rule 1 is a str: give a map"),
    (HALF | {"about": 3}, "about is 3"),
    (HALF | {"seed": True}, "seed is True"),
    (HALF | {3: 4}, "unknown entry 3"),
    ([HALF], "recipe is a list: give a map"),
    ("llm-int4", r"unknown recipe 'llm-int4' \(did you mean 'llm-int4-50'\?\)"),
    ("no/such.yaml", "recipe no/such.yaml: cannot be read: No such file"),
    (".", r"recipe \.: a directory without the recipe of a model"),
]


@pytest.mark.parametrize(("recipe", "message"), WRONG)
def test_a_wrong_recipe_gets_one_line_and_changes_nothing(recipe, message):
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ZeroskipError, match=message) as caught:
        prune(model, recipe=recipe, calibration=batches("llama", 1))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("key", ["method", "sparsity", "pattern", "seed", "include"])
def test_an_argument_may_not_contradict_the_recipe(key):
    other = {"method": "wanda", "sparsity": 0.25, "pattern": "2:4", "seed": 4, "include": "q_proj"}[key]
    mine = {"method": "magnitude", "sparsity": 0.5, "pattern": "unstructured", "seed": 1, "include": "k_proj"}
    with pytest.raises(ZeroskipError, match=f"{key} is .* in the recipe: leave one out"):
        prune(llama(), recipe=mine, **{key: other})
    with pytest.raises(ZeroskipError, match="leaves all layers dense: leave sparsity out"):
        prune(llama(), sparsity=0.5, recipe="none")


YAML = [
    ("method: wanda\n  sparsity: 0.5\n", r"line 2: mapping values are not allowed here"),
    ("rules:\n- include: *.mlp.*\n  dense: true\n", r"line 2: .*quote a pattern that starts with '\*'"),
    ("sparsity: 0.5\nmethod: wanda\nsparsity: 0.6\n", r"line 3: 'sparsity' is given twice"),
    ("sparsity: [0.5\n", r"line \d+: expected ',' or '\]'"),
    ("3: wanda\n", "line 1: 3 is no name"),
    ("? [a, b]\n: wanda\n", "line 1: .*is no name"),
    ("seed: !!python/object/apply:os.system [exit]\n", "line 1: could not determine a constructor"),
    ("--- {}\n--- {}\n", "line 2: but found another document"),
    ("a: \x00\n", "special characters are not allowed"),
    ("seed: " + "9" * 5000, "digits"),
    ("rules: " + "[" * 5000, "line|recursion"),
    ("- method\n", r"recipe .*mine\.yaml is a list"),
    ("just words\n", "is a str: give a map"),
    ("seed: 0.5\n", "seed is 0.5"),
    ("sparsity: no\n", "sparsity is 'no'"),
    ("method: rtn\nsparsity: .nan\n", "leave sparsity out"),
    ("a: &a [*a]\n", "line 1: found unconstructable recursive node"),
    ("rules: &a [*a]\n", "line 1: found unconstructable recursive node"),
]


@pytest.mark.parametrize(("text", "message"), YAML)
def test_a_wrong_file_gets_one_line_with_its_place(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ZeroskipError, match=message) as caught:
        Recipe.read(DEFAULTS, path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value) or "line" not in message


def test_files_that_are_no_text(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"method: \xff\xfe")
    with pytest.raises(ZeroskipError, match=r"mine\.yaml: is not UTF-8 text \(byte 8\)"):
        Recipe.read(DEFAULTS, str(path))
    path.write_bytes(b" " * (1 << 21))
    with pytest.raises(ZeroskipError, match="larger than a megabyte"):
        Recipe.read(DEFAULTS, path)
    path.write_text("")
    with pytest.raises(ZeroskipError, match=r"recipe .*mine\.yaml is empty: give a map of entries$"):
        Recipe.read(DEFAULTS, path)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.floats()
    | st.sampled_from(["*", "wanda", "2:4", "int8", "q"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["include", "method", "sparsity", "dense", "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)
entries = st.sampled_from(
    ["method", "pattern", "sparsity", "values", "group_size", "dense", "include", "exclude", "rules", "seed", "about"]
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(entries, plain, max_size=5))
def test_whatever_is_given_is_read_or_refused(recipe):
    try:
        read = Recipe.read(DEFAULTS, recipe)
        read.settings("model.layers.0.q")
    except ZeroskipError as error:
        assert "\n" not in str(error)
