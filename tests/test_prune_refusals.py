"""What `prune` refuses: in one line, with the model as it was."""

import math

import pytest
import torch
import torch.nn.utils.prune
from tiny_models import batches, llama, t5, tokens
from torch import nn

from zeroskip.errors import ZeroskipError
from zeroskip.formats import pack
from zeroskip.model import find_sites, replace
from zeroskip.nn import PackedLinear
from zeroskip.planning.planner import plannable
from zeroskip.prune import prune


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


WRONG = [
    ({"method": "wnada"}, "did you mean 'wanda'"),
    ({"method": "wanda+lss"}, r"did you mean 'wanda\+ls'"),
    ({"method": "wanda++ls"}, r"did you mean 'wanda\+ls'"),
    ({"method": "wanda+ls+ls"}, r"method 'wanda\+ls\+ls' names 'ls' twice: leave one out"),
    ({"method": "wanda+tune+tune"}, "names 'tune' twice"),
    ({"method": "wanda+"}, "did you mean 'wanda'"),
    ({"sparsity": None}, "needs a sparsity"),
    ({"sparsity": 1.0}, r"fraction of zeros in \[0, 1\)"),
    ({"sparsity": -0.1}, r"fraction of zeros in \[0, 1\)"),
    ({"sparsity": math.nan}, r"fraction of zeros in \[0, 1\)"),
    ({"sparsity": "half"}, r"fraction of zeros in \[0, 1\)"),
    ({"pattern": "2:4", "sparsity": 0.6}, "has sparsity 0.5, not 0.6"),
    ({"pattern": "3:5"}, r"layers\.0\.self_attn\.q_proj: 32 inputs are not a multiple of 5"),
    ({"pattern": "64:2:4"}, "2:4@64"),
    ({"pattern": "block:3x1"}, "multiple of 3"),
    ({"calibration": None}, "needs data"),
    ({"calibration": []}, "empty"),
    ({"text": ["x"]}, "not both"),
    ({"calibration": None, "text": ["x"]}, "needs tokenizer"),
    ({"calibration": None, "text": ["x"], "tokenizer": "llama"}, "tokenizer is a str: give the model's own"),
    ({"calibration": None, "text": 5, "tokenizer": lambda text: text}, "text= is a int: give a list of strings"),
    ({"include": "nothing.like.it"}, "names no site"),
    ({"exclude": "*"}, "nothing to prune"),
    ({"loss": lambda: None}, "need gradients"),
    ({"recipe": {"methd": "wanda"}}, "did you mean 'method'"),
    ({"recipe": {"sparsity": 0.7}}, "0.7 in the recipe"),
    ({"recipe": 7}, "recipe is a int: give a map"),
    ({"seed": 0.5}, "give an integer"),
    ({"include": 7}, "include is 7: give globs"),
    ({"exclude": 7}, "exclude is 7: give globs"),
    ({"include": [7]}, "include holds 7"),
    ({"pattern": "２:４"}, "unknown pattern"),
    ({"calibration": [tokens(), tokens() + 1000]}, "does not run on calibration batch 1: index out of range"),
    ({"calibration": [tokens().float()]}, "does not run on calibration batch 0: "),
    ({"journal": 5}, "journal is a int: give a path"),
    ({"stream": 1}, "stream is a int: give True or False"),
    ({"progress": 3}, "progress is a int: give a function"),
    ({"values": "int4"}, "'wanda' does not quantise"),
    ({"method": "gptq"}, "keeps the zeros that are there: leave sparsity out"),
    ({"method": "sparsegpt+gptq", "values": "int3"}, "unknown integer type 'int3'"),
    ({"method": "sparsegpt+gptq", "group_size": 48}, "32, 64 or 128"),
    ({"method": "gptq+ls+tune", "sparsity": None}, "would move weights off their integers"),
    ({"method": "gptq+wanda", "sparsity": None}, "unknown method 'gptq\\+wanda'"),
    ({"method": "snip", "loss": lambda output, batch: output.logits}, "returned a tensor of shape"),
    ({"method": "grasp", "loss": lambda output, batch: 1.0}, "returned a float"),
    ({"method": "snip", "loss": lambda output, batch: torch.tensor(1.0)}, "does not depend on the weights"),
    (
        {"method": "snip", "loss": lambda output, batch: output.logits.sum() * math.inf},
        "loss of a calibration batch is",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_bad_input_gets_one_line_and_changes_nothing(arguments, message):
    model = llama()
    before = state(model)
    given = {"method": "wanda", "sparsity": 0.5, "calibration": batches("llama", 1)} | arguments
    if given.get("pattern") in ("3:5", "64:2:4"):
        given["sparsity"] = None  # these imply theirs
    with pytest.raises(ZeroskipError, match=message) as caught:
        prune(model, **given)
    assert "\n" not in str(caught.value)
    assert same(before, state(model))


def test_nan_in_a_weight_and_in_an_activation_name_the_site():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(ZeroskipError, match=r"layers\.1\.mlp\.up_proj: its weight holds NaN or Inf"):
        prune(model, sparsity=0.5, calibration=batches("llama", 1))
    model = llama()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[0] = torch.nan
    with pytest.raises(ZeroskipError, match=r"layers\.0\.self_attn\.q_proj: its calibration input holds NaN"):
        prune(model, sparsity=0.5, calibration=batches("llama", 1))


@pytest.mark.parametrize("model", [None, "bert-base-uncased"])
def test_what_is_no_model(model):
    with pytest.raises(ZeroskipError, match=r"give an nn\.Module"):
        prune(model, "magnitude", sparsity=0.5)


def test_a_model_that_is_one_layer_has_a_name_in_messages():
    with pytest.raises(ZeroskipError, match=r"^the model: its weight is not loaded"):
        prune(nn.Linear(8, 8, device="meta"), "magnitude", sparsity=0.5)
    with pytest.raises(ZeroskipError, match=r"^the model: 9 inputs are not a multiple of 4"):
        prune(nn.Linear(9, 9), "magnitude", pattern="2:4")


def test_an_encoder_decoder_without_inputs_of_its_decoder():
    with pytest.raises(ZeroskipError, match=r"batch 0: .*\(a T5ForConditionalGeneration takes .* decoder_input_ids\)"):
        prune(t5(), "wanda", sparsity=0.5, calibration=[{"input_ids": tokens()}])


def test_weights_that_nothing_computes_with():
    model = nn.Sequential(nn.Linear(16, 16)).to(torch.float8_e4m3fn)
    with pytest.raises(ZeroskipError, match=r"0: its weight is torch\.float8_e4m3fn; convert the model"):
        prune(model, "magnitude", sparsity=0.5)


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow", "wanda+ls+tune"])
def test_what_needs_gradients_cannot_work_in_inference_mode(method):
    with torch.inference_mode(), pytest.raises(ZeroskipError, match=r"needs gradients: call prune outside"):
        prune(llama(), method, sparsity=0.5, calibration=batches("llama", 1))


def test_a_compiled_model_is_pruned_no_more():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[0] = PackedLinear.from_packed(pack(model[0].weight), model[0].bias.data)
    report = prune(model, "magnitude", sparsity=0.5)
    assert report.skipped == {"0": "compiled already; prune a model first, then compile it"}
    language = llama()
    for site in find_sites(language, exclude="lm_head"):
        replace(language, site.name, PackedLinear.from_packed(pack(site.weight()[0])))
    with pytest.raises(ZeroskipError, match="compiled already; prune the model it was made from"):
        prune(language, "rtn", values="int8", exclude=None)
    assert [row.name for row in prune(language, "rtn", values="int8", include="lm_head", exclude=None).rows] == [
        "lm_head"
    ]
    model[1] = PackedLinear.from_packed(pack(model[1].weight), model[1].bias.data)
    with pytest.raises(ZeroskipError, match=r"nothing to prune.*'0', 'compiled already; prune a model first"):
        prune(model, "magnitude", sparsity=0.5)


def test_layers_whose_weight_is_computed_are_named_with_the_remedy():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)), nn.LSTM(8, 8))
    nn.utils.prune.l1_unstructured(model[1], "weight", 0.5)
    nn.utils.parametrizations.weight_norm(model[2])
    nn.utils.weight_norm(model[3])
    torch.ao.quantization.quantize_dynamic(model, {"4": torch.ao.quantization.default_dynamic_qconfig}, inplace=True)
    skipped = prune(model, "magnitude", sparsity=0.5).skipped
    remedies = {name: reason.partition("; ")[2] for name, reason in skipped.items()}
    assert remedies == {
        "1": "call torch.nn.utils.prune.remove on it first",
        "2": "call torch.nn.utils.parametrize.remove_parametrizations on it first",
        "3": "call torch.nn.utils.remove_weight_norm on it first",
        "4": "take the model it was made from",
    }
    notes = plannable(model, None)[1]
    assert all(f"{name}: stays as it is, {reason}" in notes for name, reason in skipped.items())


def test_nothing_to_prune():
    with pytest.raises(ZeroskipError, match="nothing to prune"):
        prune(nn.Sequential(nn.ReLU()), "magnitude", sparsity=0.5)
