"""nn.MultiheadAttention and stacked experts, compiled with zeros, against torch's dense ones.

    python benchmarks/split_layers.py [--markdown]

fp32, one thread. A row is a layer at one number of tokens: the dense time, and how many times as fast the compiled one
is with strips 8:16@64 and with 90 % scattered zeros; "dense" where `compile` leaves all of it as it was. Ratios of
medians of the calling thread's processor time, taken in turns, so that a busy machine disturbs little. Every output is
compared with the dense layer's first.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time

import torch
from torch import Tensor, nn

import zeroskip
from zeroskip.nn import PackedLinear
from zeroskip.split_layers import Split

ROUNDS = 31


class Attending(nn.Module):
    """Self-attention of one sequence, [tokens, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return output


class Experts(nn.Module):
    """Mixtral's experts, two a token, chosen by turns."""

    def __init__(self, width: int, inner: int, count: int) -> None:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        super().__init__()
        config = MixtralConfig(hidden_size=width, intermediate_size=inner, num_local_experts=count)
        config._experts_implementation = "eager"
        self.experts = MixtralExperts(config)
        self.count = count
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.arange(len(x)) % self.count
        chosen = torch.stack([first, (first + 1) % self.count], 1)
        output: Tensor = self.experts(x, chosen, torch.full(chosen.shape, 0.5))
        return output


LAYERS = {
    "attention, 512 wide": (lambda: Attending(512, 8), 512, (16, 128)),
    "attention, 1,024 wide": (lambda: Attending(1024, 16), 1024, (16, 128)),
    "8 experts, 512 to 1,024": (lambda: Experts(512, 1024, 8), 512, (1, 16, 128)),
    "8 experts, 1,024 to 2,048": (lambda: Experts(1024, 2048, 8), 1024, (1, 16)),
}
ZEROS = {"8:16@64": ("8:16@64", None), "90 %": ("unstructured", 0.9)}


def row(name: str, tokens: int) -> tuple[str, ...]:
    """Return one row of the table."""
    make, width, _ = LAYERS[name]
    torch.manual_seed(0)
    dense, x = make().eval(), torch.randn(tokens, width)
    cells, ms = [], ""
    for pattern, sparsity in ZEROS.values():
        thin = copy.deepcopy(dense)
        zeroskip.prune(thin, "magnitude", pattern=pattern, sparsity=sparsity)
        ours = zeroskip.compile(copy.deepcopy(thin), tokens=(tokens,), example_inputs=x)
        with torch.inference_mode():
            gap = float((ours(x) - thin(x)).abs().max() / thin(x).abs().max())
            assert gap < 1e-4, (name, tokens, pattern, gap)
            seen: tuple[list[float], list[float]] = ([], [])
            for _ in range(ROUNDS):
                for model, times in zip((dense, ours), seen, strict=True):
                    start = time.thread_time()
                    model(x)
                    times.append(time.thread_time() - start)
        before, after = (statistics.median(times) for times in seen)
        packed = any(isinstance(module, Split | PackedLinear) for module in ours.modules())
        cells.append(f"{before / after:.2f}" if packed else "dense")
        ms = f"{before * 1e3:.2f}"
    return (f"{name}, {tokens} token{'s' * (tokens > 1)}", ms, *cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true")
    markdown = parser.parse_args().markdown
    torch.set_num_threads(1)
    separator = " | " if markdown else "  "
    for cells in (("layer", "dense, ms", *ZEROS), *(row(name, t) for name in LAYERS for t in LAYERS[name][2])):
        sys.stdout.write(separator.join(cell.ljust(9) for cell in cells).rstrip() + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
