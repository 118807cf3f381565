"""Models converted to formats of other tools and back, which plain transformers loads."""

import json

import pytest
import torch
from cli_models import cli, refused
from convert_files import bits_alike, directory
from safetensors.torch import load_file
from tiny_models import batches, llama

import zeroskip
from zeroskip.convert import convert, writable
from zeroskip.model import find_sites
from zeroskip.planning.candidates import pack_as
from zeroskip.planning.install import put_in


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """The directory of a small Llama that was pruned 2:4 and rounded to int4, and the model."""
    model = llama(torch.bfloat16, layers=1)
    zeroskip.prune(
        model, "sparsegpt+gptq", pattern="2:4", calibration=batches("llama", 1), values="int4", group_size=32
    )
    folder = tmp_path_factory.mktemp("rounded") / "model"
    zeroskip.save(model, folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder, model


@pytest.mark.parametrize("to", writable())
def test_a_model_goes_out_and_comes_back(rounded, tmp_path, to):
    from transformers import LlamaForCausalLM

    folder, model = rounded
    out = cli("convert", folder, tmp_path / "there", "--to", to, "--json", tmp_path / "there.json")
    assert out.exit_code == 0, out.output
    assert "sparsity_config" not in (tmp_path / "there" / "config.json").read_text()
    done = json.loads((tmp_path / "there.json").read_text())
    assert done["to"] == to and (to == "dense" or (done["written"] == 7 and done["bytes_after"] < done["bytes_before"]))
    convert(tmp_path / "there", tmp_path / "back")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "back")
    want = model.state_dict()
    assert all(bits_alike(value, want[name]) for name, value in loaded.state_dict().items())
    assert (tmp_path / "back" / "tokenizer.json").exists() and (tmp_path / "back" / "generation_config.json").exists()
    for before, after in zip(find_sites(model), find_sites(zeroskip.load(tmp_path / "back")), strict=True):
        assert torch.equal(after.scales, before.scales)


def test_transformers_does_not_make_up_the_weights_of_a_bitmask_model(rounded, tmp_path):
    from transformers import LlamaForCausalLM

    convert(rounded[0], tmp_path / "out", "sparse-bitmask")
    with pytest.raises((ImportError, ValueError)):  # it asks for compressed-tensors
        LlamaForCausalLM.from_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    convert(rounded[0], tmp_path / "old", "sparse-bitmask", sparsity_config=True)
    section = json.loads((tmp_path / "old" / "config.json").read_text())["quantization_config"]["sparsity_config"]
    assert config["quantization_config"] == {"quant_method": "compressed-tensors"}
    assert section["format"] == "sparse-bitmask" and "model.layers.0.mlp.up_proj" in section["targets"]


def test_a_compiled_model_becomes_ordinary_again(rounded, tmp_path):
    from transformers import LlamaForCausalLM

    model = zeroskip.load(rounded[0])
    for site in find_sites(model)[:3]:
        packed = pack_as("bitmask", site.weight()[0], "int4", site.scales)
        put_in(model, site.module, zeroskip.nn.PackedLinear.from_packed(packed, None))
    zeroskip.save(model, tmp_path / "compiled")
    done = convert(tmp_path / "compiled", tmp_path / "out")
    assert done.found == {"zeroskip": 3} and done.scales == 7
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, rounded[1].state_dict()[name]) for name, value in loaded.state_dict().items())


def test_our_packed_directory_holds_the_codes_and_the_rest_is_dense(rounded, tmp_path):
    done = convert(rounded[0], tmp_path / "out", "zeroskip")
    model = zeroskip.load(tmp_path / "out")
    for site in find_sites(rounded[1]):
        packed = model.get_submodule(site.name).packed
        assert packed.values == "int4" and packed.group_size == 32
        assert torch.equal(zeroskip.unpack(packed).to(torch.bfloat16), site.weight()[0])
    assert done.written == len(find_sites(rounded[1])) and done.to == "zeroskip"
    ids = torch.arange(12).view(1, -1)
    with torch.inference_mode():
        want, got = rounded[1](ids).logits.float(), model(ids).logits.float()
    assert float((got - want).abs().max()) <= 0.05 * float(want.abs().max())
    assert any("tied" in note for note in done.notes)


def test_shards(rounded, tmp_path):
    convert(rounded[0], tmp_path / "out", "sparse-24-bitmask", max_shard_bytes=4000)
    convert(tmp_path / "out", tmp_path / "back")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    got, want = load_file(tmp_path / "back" / "model.safetensors"), rounded[1].state_dict()
    assert all(torch.equal(value, want[name]) for name, value in got.items())


def test_refusals(rounded, tmp_path):
    folder = rounded[0]
    assert "unknown format 'sparse_bitmask' (did you mean 'sparse-bitmask'?)" in refused(
        "convert", folder, tmp_path / "out", "--to", "sparse_bitmask"
    )
    assert "leave them out" in refused("convert", folder, tmp_path / "out", "--old-names")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    assert "not an empty directory" in refused("convert", folder, tmp_path / "full")
    assert "no such directory or file" in refused("convert", tmp_path / "none", tmp_path / "out")
    empty = directory(tmp_path / "gptq", {"a": torch.ones(1)}, {"quantization_config": {"quant_method": "gptq"}})
    assert "is quantised by 'gptq'" in refused("convert", empty, tmp_path / "out")
    random = directory(tmp_path / "random", {"p.weight": torch.ones(4, 8)})
    assert "no weight is 2:4" in refused("convert", random, tmp_path / "out", "--to", "sparse-24-bitmask")
    assert "leave them out with 'zeroskip'" in refused(
        "convert", folder, tmp_path / "out", "--to", "zeroskip", "--old-names"
    )
    assert "names no architecture" in refused("convert", random, tmp_path / "out", "--to", "zeroskip")
    assert not (tmp_path / "out").exists()
