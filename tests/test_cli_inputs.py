"""`--inputs`: models of images on the command line."""

import numpy as np
import pytest
import torch
from cli_models import cli, refused, shorten_races
from safetensors.torch import save_file
from torch import nn

from zeroskip.cli.inputs import read_inputs
from zeroskip.errors import ZeroskipError

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A small pruned ResNet of transformers, in a directory."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 16], depths=[1, 1], layer_type="basic")
    model = ResNetForImageClassification(config)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.mul_(torch.rand(layer.weight.shape) < 0.3)
    path = tmp_path_factory.mktemp("images") / "model"
    model.save_pretrained(path)
    return path


def test_convolutions_are_measured_at_the_sizes_of_a_file(images, tmp_path, monkeypatch):
    shorten_races(monkeypatch)
    np.save(tmp_path / "x.npy", X.double().numpy())
    result = cli("analyze", images, "--tokens", "1", "--inputs", tmp_path / "x.npy")
    assert result.exit_code == 0, result.stderr
    assert "channels_last fp32" in result.stdout and "convolution" in result.stdout
    save_file({"pixel_values": X}, tmp_path / "x.safetensors")
    result = cli("compile", images, tmp_path / "out", "--tokens", "1", "--inputs", tmp_path / "x.safetensors")
    assert result.exit_code == 0, result.stderr
    assert "on the example inputs" in result.stdout or "nothing was replaced" in result.stdout


def test_what_files_hold(tmp_path):
    model = nn.Linear(2, 2, dtype=torch.bfloat16)
    ids = torch.arange(3)
    torch.save((X, ids), tmp_path / "x.pt")
    first, second = read_inputs(tmp_path / "x.pt", model)
    assert first.dtype == torch.bfloat16 and torch.equal(second, ids)
    torch.save({"ids": ids}, tmp_path / "x.pth")
    assert torch.equal(read_inputs(tmp_path / "x.pth", model)["ids"], ids)
    assert read_inputs(None, model) is None
    torch.save([], tmp_path / "none.pt")
    torch.save({"ids": 3}, tmp_path / "three.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "code.pt")
    np.save(tmp_path / "objects.npy", np.array([None]), allow_pickle=True)
    (tmp_path / "short.safetensors").write_bytes(b"\0" * 5)
    for name, problem in (
        ("none.pt", "holds a list"),
        ("three.pt", "holds a dict"),
        ("code.pt", "cannot be read"),
        ("objects.npy", "cannot be read"),
        ("short.safetensors", "cannot be read"),
        ("missing.npy", "cannot be read"),
        ("x.png", "inputs come as"),
    ):
        with pytest.raises(ZeroskipError, match=problem):
            read_inputs(tmp_path / name, model)


def test_inputs_that_do_not_fit_are_one_line(images, tmp_path):
    np.save(tmp_path / "x.npy", X[:, :2].numpy())
    assert "the model does not run on example_inputs" in refused("analyze", images, "--inputs", tmp_path / "x.npy")
