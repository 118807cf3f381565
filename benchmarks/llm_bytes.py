"""Bytes of a language model's weights in memory, dense and as a bitmask, beside llama.cpp's Q4_0: packed, not computed.

    python benchmarks/llm_bytes.py --sparsity 0.5

Each distinct shape of the 1.1 B Llama of `zeroskip bench llm --shape llama-1b` is packed once, with random weights of
which the smallest in each row are zero; embeddings and head, which are not tied, are dense. Q4_0 is what llama.cpp
writes: 4.5 bits a weight, its head in Q6_K (210 bytes for 256 weights), norms in fp32.
"""

from __future__ import annotations

import argparse
import sys

import torch

from zeroskip.bench.llm_models import VOCABULARY
from zeroskip.bench.suites import LLAMA_1B
from zeroskip.formats import pack
from zeroskip.planning.report import table

GROUPS = (32, 64, 128)
Q4_0, Q6_K = 18 / 32, 210 / 256  # bytes a weight


def random_weight(m: int, k: int, sparsity: float) -> torch.Tensor:
    """fp32 [m, k], this fraction of each row zero."""
    weight = torch.randn(m, k, generator=torch.Generator().manual_seed(m + k))
    limit = weight.abs().kthvalue(max(1, round(sparsity * k)), dim=1, keepdim=True).values
    return torch.where(weight.abs() > limit, weight, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.5)
    sparsity = parser.parse_args().sparsity
    shapes, hidden = LLAMA_1B.layers(), LLAMA_1B.hidden
    norms = 4 * hidden * (2 * LLAMA_1B.blocks + 1)
    words = VOCABULARY * hidden
    inside = sum(m * k * count for (m, k), count in shapes.items())
    theirs = (inside + words) * Q4_0 + words * Q6_K + norms
    weights = {shape: random_weight(*shape, sparsity) for shape in shapes}
    end = torch.randn(VOCABULARY, hidden, generator=torch.Generator().manual_seed(0))
    ends = {
        (values, group): 2 * pack(end, "dense", values, group_size=group).nbytes
        for values, group in (("int8", 32), ("int8", 64), ("int8", 128), ("int4", 64))
    }
    lines = []
    for layout in ("dense", "bitmask"):
        for group in GROUPS:
            blocks = sum(
                pack(weights[shape], layout, "int4", group_size=group).nbytes * count for shape, count in shapes.items()
            )
            line = [f"{layout} int4", str(group), f"{8 * blocks / inside:.2f}"]
            for both in (("int8", group), ("int4", 64)):
                whole = blocks + ends[both] + norms
                line += [f"{whole / 1e6:.1f}", f"{whole / theirs:.3f}"]
            lines.append(line)
    head = ["blocks", "group", "bits a weight", "MB, ends in 8 bits", "x Q4_0", "MB, ends in 4 bits", "x Q4_0"]
    sys.stdout.write("\n".join([f"Q4_0: {theirs / 1e6:.1f} MB; ends: embeddings and head", *table(head, lines)]) + "\n")


if __name__ == "__main__":
    main()
