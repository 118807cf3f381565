"""A trained convolutional network with its default settings, through the functions of the benchmark."""

import importlib.util
from pathlib import Path

import torch

from zeroskip.model import find_sites
from zeroskip.prune import prune

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "prune_resnet.py"


def test_half_of_resnet20_goes(data):
    """Images are smoothed noise: what is held is that the refit helps on inputs that did not calibrate."""
    spec = importlib.util.spec_from_file_location("prune_resnet", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder = data("resnet_cifar10").parent
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 16, 3, 8, 8, generator=draw)
    images = [torch.nn.functional.interpolate(each, scale_factor=4, mode="bilinear") for each in noise]
    dense = script.load(folder, "resnet20")
    with torch.inference_mode():
        want = dense(images[2])
    errors = {}
    for method in ("wanda", "wanda+ls"):
        model = script.load(folder, "resnet20")
        report = prune(model, method, sparsity=0.5, calibration=images[:2])
        assert len(report.rows) == 20 and not report.skipped
        for site in find_sites(model):
            assert int((site.weight() == 0).sum()) == round(site.weight().numel() * 0.5)
        with torch.inference_mode():
            errors[method] = float((model(images[2]) - want).square().sum() / want.square().sum())
    assert errors["wanda+ls"] < 0.5 * errors["wanda"] and errors["wanda+ls"] < 0.2
