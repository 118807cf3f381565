"""ResNet-20 or ResNet-56 of CIFAR-10 after pruning: accuracy on photographs, and what `compile` makes of it.

    python benchmarks/prune_resnet.py DATA --net resnet20 --methods wanda+ls sparsegpt --markdown

DATA holds the folders resnet_cifar10 (weights) and sample_images (photographs with labels); pillow reads those. The
images of CIFAR-10 are in neither, so this is no test set accuracy: seeded crops of photographs, scaled to 32 x 32.
Calibration: 512 crops of the photographs that show no class of CIFAR-10. Scored: 1,200 crops of those of cats, dogs and
birds (`right`), and on how many the pruned network says what the dense one says (`same`); `error` is
|logits - dense logits|^2 / |dense logits|^2.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import zeroskip

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BIRD, CAT, DOG = 2, 3, 5
SCORED = {
    "bird.png": BIRD,
    "owl.jpg": BIRD,
    "parrot.jpg": BIRD,
    "cat.png": CAT,
    "imprinting_cat_test_0.png": CAT,
    "imprinting_dog_train_0.png": DOG,
}
CALIBRATING = ("dragonfly.png", "hot_dog.jpg", "imprinting_hotdog_test_0.png", "sunflower.png")
ROUNDS = 21
LEAST = 0.6  # of the shorter side: what a crop covers at least


class Block(nn.Module):
    """Two convolutions; the shortcut drops every other pixel and pads channels with zeros."""

    def __init__(self, entering: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(entering, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.more, self.stride = (width - entering) // 2, stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more, self.more))).relu()


class ResNet(nn.Module):
    """Three stages of n blocks with 16, 32 and 64 channels."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = [16, 16, 32, 64]
        for stage in (1, 2, 3):
            before, width = widths[stage - 1], widths[stage]
            first = Block(before, width, 1 if stage == 1 else 2)
            setattr(self, f"layer{stage}", nn.Sequential(first, *(Block(width, width, 1) for _ in range(n - 1))))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def load(folder: Path, net: str) -> ResNet:
    """Return the trained network, in eval mode."""
    model = ResNet({"resnet20": 3, "resnet56": 9}[net])
    with np.load(folder / "resnet_cifar10" / f"{net}.npz") as arrays:
        state = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    model.load_state_dict({name: value for name, value in state.items() if name in model.state_dict()})
    return model.eval()


def crops(folder: Path, names: list[str], each: int, seed: int) -> Tensor:
    """Return [photographs x each, 3, 32, 32]: seeded square crops, some mirrored, normalised."""
    from PIL import Image

    draw, found = np.random.default_rng(seed), []
    for name in names:
        image = Image.open(folder / "sample_images" / name).convert("RGB")
        for _ in range(each):
            side = int(min(image.size) * draw.uniform(LEAST, 1))
            left, top = (int(draw.integers(0, size - side + 1)) for size in image.size)
            small = image.crop((left, top, left + side, top + side)).resize((32, 32), Image.Resampling.BOX)
            pixels = np.asarray(small, dtype=np.float32) / 255
            found.append(pixels[:, :: -1 if draw.random() < 0.5 else 1])
    stacked = torch.from_numpy(np.stack(found))
    return ((stacked - torch.tensor(MEAN)) / torch.tensor(DEVIATION)).permute(0, 3, 1, 2).contiguous()


def whole(dense: nn.Module, ours: nn.Module, images: Tensor) -> str:
    """Say how long both networks take for one batch: medians of processor time, in turns; torch in both layouts."""
    last = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    calls = {
        "torch": lambda: dense(images),
        "torch, channels last": lambda: last(images.contiguous(memory_format=torch.channels_last)),
        "compiled": lambda: ours(images),
    }
    seen: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, call in calls.items():
                start = time.process_time()
                call()
                seen[name].append(time.process_time() - start)
    found = {name: statistics.median(times) for name, times in seen.items()}
    figures = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in found.items())
    best = min(found["torch"], found["torch, channels last"])
    return f"the whole network, {len(images)} images: {figures}; {best / found['compiled']:.2f} times as fast"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--net", default="resnet20", choices=["resnet20", "resnet56"])
    parser.add_argument("--methods", nargs="+", default=["magnitude", "wanda", "wanda+ls", "sparsegpt", "admm+ls"])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern", default="unstructured")
    parser.add_argument("--compile", action="store_true", help="compile the last one and show the plan, batch 64")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    calibration = list(crops(given.data, list(CALIBRATING), 128, 0).split(64))
    scored = crops(given.data, list(SCORED), 200, 1)
    labels = torch.tensor(list(SCORED.values())).repeat_interleave(200)
    dense = load(given.data, given.net)
    with torch.inference_mode():
        want = dense(scored)
    rows = [("dense", f"{(want.argmax(1) == labels).float().mean():.3f}", "1.000", "0", "-")]
    for method in given.methods:
        model, started = load(given.data, given.net), time.perf_counter()
        sparsity = given.sparsity if given.pattern == "unstructured" or "block" in given.pattern else None
        # The first layer has three channels, which no N:M pattern divides.
        exclude = ("conv1",) if given.pattern != "unstructured" else ()
        exclude = tuple(f"re:{name}" for name in exclude)
        zeroskip.prune(
            model, method, sparsity=sparsity, pattern=given.pattern, calibration=calibration, exclude=exclude
        )
        seconds = time.perf_counter() - started
        with torch.inference_mode():
            logits = model(scored)
        right = (logits.argmax(1) == labels).float().mean()
        same = (logits.argmax(1) == want.argmax(1)).float().mean()
        error = float((logits - want).square().sum() / want.square().sum())
        rows.append((method, f"{right:.3f}", f"{same:.3f}", f"{error:.4f}", f"{seconds:.1f}"))
    head = ("method", "right", "same", "error", "s")
    separator = " | " if given.markdown else "  "
    lines = [separator.join(cell.ljust(12) for cell in row).rstrip() for row in (head, *rows)]
    sys.stdout.write("\n".join(lines) + "\n")
    if given.compile:
        zeroskip.compile(model, tokens=(64,), example_inputs=scored[:64])
        sys.stdout.write(f"\n{zeroskip.plan_of(model)}\n\n{whole(dense, model, scored[:64])}\n")


if __name__ == "__main__":
    main()
