"""Weights that a solver rounded to integers keep their scales on the disk, so that packing finds the same codes."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from io_models import plain
from tiny_models import batches, llama

import zeroskip
from zeroskip.errors import ZeroskipError
from zeroskip.io.scales import FILE
from zeroskip.model import find_sites
from zeroskip.planning.candidates import pack_as
from zeroskip.planning.install import put_in, thaw


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """A directory of a model in bf16 that was pruned and rounded, and the model."""
    model = llama(torch.bfloat16, layers=1)
    zeroskip.prune(model, "sparsegpt+gptq", sparsity=0.5, calibration=batches("llama", 1), values="int4", group_size=32)
    folder = tmp_path_factory.mktemp("rounded") / "model"
    zeroskip.save(model, folder)
    return folder, model


def codes(site, values="int4"):
    return pack_as("dense", site.weight()[0], values, site.scales).codes


def test_packing_finds_the_codes_after_save_and_load(rounded):
    folder, model = rounded
    loaded = zeroskip.load(folder)
    for before, after in zip(find_sites(model), find_sites(loaded), strict=True):
        assert after.scales.dtype == before.scales.dtype and torch.equal(after.scales, before.scales)
        want = (before.weight()[0].float() / before.scales[0].float().repeat_interleave(32, 1)).round()
        assert torch.equal(codes(after).float(), want) and torch.equal(codes(after), codes(before))


def test_plain_transformers_loads_the_same_weights(rounded):
    from transformers import LlamaForCausalLM

    folder, model = rounded
    loaded = LlamaForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_a_thawed_layer_still_has_its_codes(rounded):
    loaded = zeroskip.load(rounded[0])
    site = find_sites(loaded)[0]
    before = codes(site)
    packed = pack_as("bitmask", site.weight()[0], "int4", site.scales)
    put_in(loaded, site.module, zeroskip.nn.PackedLinear.from_packed(packed, None))
    assert thaw(loaded) == [site.name]
    assert torch.equal(codes(find_sites(loaded)[0]), before)


def test_any_module_and_one_without_scales(tmp_path):
    model = plain(None)
    zeroskip.save(model, tmp_path / "without")
    assert not (tmp_path / "without" / FILE).exists()
    site = find_sites(model)[0]
    scales = torch.full((1, site.shape[1], -(-site.shape[2] // 32)), 0.25)
    site.keep_scales(scales)
    zeroskip.save(model, tmp_path / "with")
    assert torch.equal(find_sites(zeroskip.load(tmp_path / "with", model=plain(None)))[0].scales, scales)


GIVEN = {
    "no such site": ({"model.layers.9": torch.ones(1, 4, 1)}, "model.layers.9: the model has no such site"),
    "no site": ({"model.norm": torch.ones(1, 4, 1)}, "model.norm: the model has no such site"),
    "shape": ({"model.layers.0.mlp.up_proj": torch.ones(64, 1)}, r"\[64, 1\] where \[1, 64, groups of inputs\]"),
    "type": ({"model.layers.0.mlp.up_proj": torch.ones(1, 64, 1, dtype=torch.float64)}, "torch.float64"),
    "count": ({"model.layers.0.mlp.up_proj": torch.ones(1, 64, 5)}, "5 scales for 32 inputs"),
    "zero": ({"model.layers.0.mlp.up_proj": torch.zeros(1, 64, 1)}, "a scale is zero, negative or not finite"),
}


@pytest.mark.parametrize("what", GIVEN)
def test_what_fits_no_weight_gets_one_line(rounded, tmp_path, what):
    tensors, problem = GIVEN[what]
    for path in rounded[0].iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / FILE).unlink()
    safetensors.torch.save_file(tensors, tmp_path / FILE)
    with pytest.raises(ZeroskipError, match=problem) as caught:
        zeroskip.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_cut_file_gets_one_line(rounded, tmp_path):
    for path in rounded[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[: -9 if path.name == FILE else None])
    with pytest.raises(ZeroskipError, match=f"{FILE}: "):
        zeroskip.load(Path(tmp_path))
