"""Pruned convolutions of the sizes of ResNet-50 and ResNet-20 against torch's dense ones, layer by layer.

    python benchmarks/conv_shapes.py [--markdown]

fp32, one thread. A row is a layer: torch's time with the faster of its two memory layouts, and how many times as fast
ours is, given channels last: strips 8:16@64 in `strip_nm`, and 90 % scattered zeros in the faster of `csr` and
`bitmask`. Medians of the calling thread's processor time, taken in turns, so that a busy machine disturbs little.
Every output is compared with float64 first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import zeroskip as zs
from zeroskip.conv_layers import PackedConv, in_channels_last
from zeroskip.sites.conv import ConvAdapter

LAYERS = [  # batch, channels, outputs, height and width, kernel, stride
    *[(1, 64, 64, 56, 3, 1), (1, 128, 128, 56, 3, 2), (1, 128, 128, 28, 3, 1), (1, 256, 256, 14, 3, 1)],
    *[(1, 512, 512, 7, 3, 1), (1, 256, 64, 56, 1, 1), (1, 1024, 256, 14, 1, 1)],
    *[(64, 16, 16, 32, 3, 1), (64, 32, 32, 16, 3, 1), (64, 64, 64, 8, 3, 1)],
]
ROUNDS = 21


def strips(weight: Tensor) -> Tensor:
    """Keep 8 of every 16 inputs, the choice shared by 64 rows."""
    rows, columns = weight.shape
    draw = torch.rand(-(-rows // 64), columns // 16, 16)
    kept = (draw.argsort(-1).argsort(-1) < 8).view(-1, columns).repeat_interleave(64, 0)
    return weight * kept[:rows]


def times(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median seconds of each, called in turns."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            found[name].append(time.thread_time() - start)
    return {name: statistics.median(each) for name, each in found.items()}


def layer(batch: int, channels: int, outputs: int, size: int, kernel: int, stride: int) -> tuple[str, ...]:
    """Return one row of the table."""
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, outputs, kernel, stride, kernel // 2, bias=False)
    first = torch.randn(batch, channels, size, size)
    last = first.contiguous(memory_format=torch.channels_last)
    dense = in_channels_last(conv)
    calls: dict[str, Callable[[], object]] = {"first": lambda: conv(first), "last": lambda: dense(last)}
    weight = ConvAdapter.view(conv, "weight", conv.weight.detach())[0].contiguous()
    scattered = weight * (torch.rand(weight.shape) >= 0.9)
    for name, matrix in (("strip_nm", strips(weight)), ("csr", scattered), ("bitmask", scattered)):
        ours = PackedConv.of(conv, zs.pack(matrix, name), None)
        want = ours.dense(matrix).double()(first.double())
        assert float((ours(last) - want).abs().max()) < 1e-4, name
        calls[name] = lambda ours=ours: ours(last)
    found = times(calls)
    torchs = min(found["first"], found["last"])
    sparse = min(found["csr"], found["bitmask"])
    shape = f"{batch} x {channels} -> {outputs}, {size} x {size}, {kernel} x {kernel}" + f" / {stride}" * (stride > 1)
    return shape, f"{torchs * 1e3:.1f}", f"{torchs / found['strip_nm']:.2f}", f"{torchs / sparse:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true")
    markdown = parser.parse_args().markdown
    torch.set_num_threads(1)
    separator = " | " if markdown else "  "
    with torch.inference_mode():
        for row in (("layer", "torch, ms", "8:16@64", "90 %"), *(layer(*sizes) for sizes in LAYERS)):
            sys.stdout.write(separator.join(cell.ljust(9) for cell in row).rstrip() + "\n")


if __name__ == "__main__":
    main()
