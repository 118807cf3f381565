"""Weights with masks beside them, as the tools that make them leave them."""

import numpy as np
import pytest
import torch
from cli_models import cli
from convert_files import bits_alike, converted, directory
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune as torch_prune

from zeroskip.convert import convert
from zeroskip.errors import ZeroskipError


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5, bias=False))


def mask_of(weight, seed=0):
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def masked(weight, mask):
    return torch.where(mask, weight.detach(), 0.0)


def test_torch_nn_utils_prune(tmp_path):
    model = network()
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    torch_prune.random_unstructured(model[0], "bias", 0.5)
    got = converted(directory(tmp_path / "a", model.state_dict()))
    assert sorted(got) == ["0.bias", "0.weight", "2.weight"]
    assert torch.equal(got["0.weight"], model[0].weight) and torch.equal(got["0.bias"], model[0].bias)
    assert not (got["0.weight"].view(torch.int32) == -(1 << 31)).any()  # no -0.0


@pytest.mark.parametrize("beside", [True, False])
def test_torch_ao_sparsifiers(tmp_path, beside):
    from torch.ao.pruning import WeightNormSparsifier

    model = network()
    sparsifier = WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 1), zeros_per_block=1)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    state = model.state_dict()
    assert "0.parametrizations.weight.original" in state
    if beside:  # as releases before stored it
        state["0.parametrizations.weight.0.mask"] = model[0].parametrizations.weight[0].mask
    folder = directory(tmp_path / "a", state)
    torch.save(sparsifier.state_dict(), tmp_path / "sparsifier.pt")
    got = converted(folder, masks=() if beside else tmp_path / "sparsifier.pt")
    assert sorted(got) == ["0.bias", "0.weight", "2.weight"]
    assert torch.equal(got["0.weight"], model[0].weight) and (got["0.weight"] == 0).float().mean() == 0.5
    if not beside:
        with pytest.raises(ZeroskipError, match=r"original: its mask is in no file"):
            convert(folder, tmp_path / "c")


@pytest.mark.parametrize("tool", ["asp", "modelopt"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_masks_as_buffers(tmp_path, tool, dtype):
    model = network()
    name = {"asp": "__weight_mma_mask", "modelopt": "_weight_mask"}[tool]
    mask = mask_of(model[0].weight)
    model[0].register_buffer(name, mask.to(dtype))
    if tool == "asp":
        model[0].register_buffer("__weight_mma_pruned_p", model[0].weight.detach() * ~mask)
    got = converted(directory(tmp_path / "a", model.state_dict()))
    assert sorted(got) == ["0.bias", "0.weight", "2.weight"]
    assert bits_alike(got["0.weight"], masked(model[0].weight, mask))
    assert torch.equal(got["2.weight"], model[2].weight)


@pytest.mark.parametrize("name", ["0.weight.mask", "0.mask"])
@pytest.mark.parametrize("packed", [True, False])
def test_maskllm(tmp_path, name, packed):
    model = network()
    masks = {name: mask_of(model[0].weight), "2.weight.mask": mask_of(model[2].weight)}
    flat = {key: mask.flatten().numpy() for key, mask in masks.items()}
    whole = {key: np.packbits(mask) if packed else masks[key].numpy() for key, mask in flat.items()}
    np.savez_compressed(tmp_path / "mask_compressed.npz", **whole)
    folder = directory(tmp_path / "a", model.state_dict())
    done = cli("convert", folder, tmp_path / "b", "--mask", tmp_path / "mask_compressed.npz")
    assert done.exit_code == 0 and "2 maskllm -> dense" in done.stdout, done.output
    got = load_file(tmp_path / "b" / "model.safetensors")
    assert bits_alike(got["0.weight"], masked(model[0].weight, masks[name]))
    assert bits_alike(got["2.weight"], masked(model[2].weight, masks["2.weight.mask"]))


def test_a_mask_of_nothing_is_refused_and_a_buffer_called_mask_is_none(tmp_path):
    folder = directory(tmp_path / "a", {"attn.weight": torch.ones(4, 4), "attn.mask": torch.ones(2, 2)})
    got = converted(folder)
    assert sorted(got) == ["attn.mask", "attn.weight"]
    save_file({"atn.weight.mask": torch.ones(4, 4)}, tmp_path / "masks.safetensors")
    with pytest.raises(ZeroskipError, match=r"atn.weight.mask: is no mask of a tensor of .*did you mean 'attn.weight'"):
        convert(folder, tmp_path / "b", masks=tmp_path / "masks.safetensors")


def test_packed_bits_go_from_the_highest():
    from zeroskip.convert.bits import pack_bits, unpack_bits

    byte = torch.tensor([0b10110000], dtype=torch.uint8)
    assert unpack_bits(byte, "high").tolist() == [True, False, True, True, False, False, False, False]
    assert pack_bits(unpack_bits(byte).view(1, 8)).tolist() == [[0b10110000]]


@pytest.mark.parametrize("nested", [False, True])
def test_what_torch_saved(tmp_path, nested):
    model = network()
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    folder = tmp_path / "a"
    directory(folder, {"x": torch.ones(1)})
    state = dict(model.state_dict())
    torch.save({"epoch": 3, "state_dict": state} if nested else state, folder / "pruned.pt")
    convert(folder / "pruned.pt", tmp_path / "b")
    got = load_file(tmp_path / "b" / "model.safetensors")
    assert sorted(got) == ["0.bias", "0.weight", "2.weight"] and torch.equal(got["0.weight"], model[0].weight)
    (folder / "model.safetensors").unlink()
    (folder / "pruned.pt").rename(folder / "pytorch_model.bin")
    convert(folder, tmp_path / "c")
    assert torch.equal(load_file(tmp_path / "c" / "model.safetensors")["0.weight"], model[0].weight)


class Harm:
    """What a hostile file holds."""

    def __reduce__(self):
        return (print, ("harm",))


BAD = {
    "shape": ({"0.weight_mask": torch.ones(8, 6)}, r"0.weight_mask: a mask \[8, 6\] for a weight \[6, 8\]"),
    "values": ({"0.weight_mask": torch.full((6, 8), 0.5)}, "0.weight_mask: holds other values than 0 and 1"),
    "both": ({"0.weight_mask": torch.ones(6, 8), "0.weight": torch.ones(6, 8)}, "and 0.weight are both there"),
}


@pytest.mark.parametrize("what", BAD)
def test_masks_that_do_not_fit_get_one_line(tmp_path, what):
    more, problem = BAD[what]
    folder = directory(tmp_path / "a", {"0.weight_orig": torch.ones(6, 8), **more})
    with pytest.raises(ZeroskipError, match=problem) as caught:
        convert(folder, tmp_path / "b")
    assert "\n" not in str(caught.value) and "model.safetensors" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_nothing_is_unpickled(tmp_path, capsys):
    folder = directory(tmp_path / "a", {"0.weight": torch.ones(6, 8)})
    torch.save({"0.weight": torch.ones(6, 8), "more": Harm()}, folder / "model.pt")
    np.savez(tmp_path / "mask.npz", **{"0.weight.mask": np.array([Harm()], dtype=object)})
    for source, masks, problem in (
        (folder / "model.pt", (), "model.pt: holds other objects than tensors"),
        (folder, tmp_path / "mask.npz", "0.weight.mask: is object"),
    ):
        with pytest.raises(ZeroskipError, match=problem) as caught:
            convert(source, tmp_path / "b", masks=masks)
        assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["m.npz", "m.pt", "m.safetensors", "m.txt", "none.npz"])
def test_damaged_mask_files_get_one_line(tmp_path, name):
    folder = directory(tmp_path / "a", {"0.weight": torch.ones(6, 8)})
    np.savez(tmp_path / "m.npz", **{"0.weight.mask": np.ones(6, dtype=np.uint8)})
    torch.save({"0.weight.mask": torch.ones(6, 8)}, tmp_path / "m.pt")
    save_file({"0.weight.mask": torch.ones(6, 8)}, tmp_path / "m.safetensors")
    (tmp_path / "m.txt").write_text("no masks")
    if (tmp_path / name).exists():
        content = (tmp_path / name).read_bytes()
        for cut in {0, 10, len(content) // 2, len(content) - 1}:
            (tmp_path / name).write_bytes(content[:cut])
            with pytest.raises(ZeroskipError, match=name) as caught:
                convert(folder, tmp_path / "b", masks=[tmp_path / name])
            assert "\n" not in str(caught.value)
    else:
        with pytest.raises(ZeroskipError, match="no such file of masks"):
            convert(folder, tmp_path / "b", masks=[tmp_path / name])
