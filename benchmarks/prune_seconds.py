"""CPU seconds that pruning takes for a billion parameters of a Llama: measured on parts of its layers, added up.

    python benchmarks/prune_seconds.py --hidden 2048 --ffn 5632 --pattern 8:16@64 [--method obs] [--threads 1]

A layer [out, in] costs what its inputs cost (factorisations) and so much more for each row. Both come from two runs of
the method on random weights of 128 and 256 rows, with the layer's inputs and correlated data. To that is added what
calibration takes: two forward passes of every layer (one collects, one feeds on the pruned outputs; attention itself is
left out) and one Gram matrix for each distinct input, timed on 512 tokens and scaled to --tokens. Embeddings and head,
which stay dense, count for nothing. It is an extrapolation: no model runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

import torch

from zeroskip.prune import Composition, Pattern, Problem
from zeroskip.prune.recipe import default_method

ROWS = (128, 256)
TOKENS = 512


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of all threads."""
    started = time.process_time()
    work()
    return time.process_time() - started


def inputs_of(width: int) -> torch.Tensor:
    """[2 width, width] correlated."""
    draw = torch.Generator().manual_seed(width)
    base = torch.randn(2 * width, width // 4, generator=draw) @ torch.randn(width // 4, width, generator=draw)
    return base / (width // 4) ** 0.5 + 0.5 * torch.randn(2 * width, width, generator=draw)


def line(method: Composition, pattern: Pattern, sparsity: float, width: int) -> tuple[float, float]:
    """Return (seconds of a layer with so many inputs and no row, seconds of each row)."""
    x = inputs_of(width)
    stats = {"gram": x.t() @ x, "sumsq": x.square().sum(0), "sum": x.sum(0)}
    taken = []
    for rows in ROWS:
        draw = torch.Generator().manual_seed(0)
        weight = torch.randn(rows, width, generator=draw)
        problem = Problem("layer", weight, pattern, sparsity, stats, draw, len(x))
        taken.append(seconds(lambda problem=problem: method.run(problem)))
    each = max(0.0, taken[1] - taken[0]) / (ROWS[1] - ROWS[0])
    return max(0.0, taken[0] - each * ROWS[0]), each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=5632)
    parser.add_argument("--kv", type=int, help="outputs of k and v; default: hidden / 4")
    parser.add_argument("--method", help="default: that of the pattern")
    parser.add_argument("--pattern", default="8:16@64")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=128 * 2048, help="of the calibration")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    hidden, ffn = arguments.hidden, arguments.ffn
    kv = arguments.kv or hidden // 4
    pattern = Pattern.parse(arguments.pattern)
    method = Composition.parse(arguments.method or default_method(pattern))
    sparsity = arguments.sparsity if pattern.sparsity is None else pattern.sparsity
    layers = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    layers += [(ffn, hidden), (ffn, hidden), (hidden, ffn)]
    parameters = sum(rows * width for rows, width in layers)
    costs = {width: line(method, pattern, sparsity, width) for width in (hidden, ffn)}
    solve = sum(costs[width][0] + costs[width][1] * rows for rows, width in layers)
    scale = arguments.tokens / TOKENS
    passes = grams = 0.0
    for width, distinct in ((hidden, 3), (ffn, 1)):  # q, k, v share theirs, gate and up too
        x = torch.randn(TOKENS, width)
        weight = torch.randn(512, width)
        grams += distinct * scale * seconds(lambda x=x: x.t() @ x)
        once = seconds(lambda x=x, weight=weight: x @ weight.t()) / len(weight)
        passes += 2 * scale * once * sum(rows for rows, each in layers if each == width)
    found = {
        "method": method.name,
        "pattern": pattern.name,
        "hidden": hidden,
        "ffn": ffn,
        "block_parameters": parameters,
    }
    found |= {"seconds_a_block": {"solve": solve, "forward": passes, "gram": grams}}
    found["cpu_hours_per_billion"] = (solve + passes + grams) / parameters * 1e9 / 3600
    found["solve_hours_per_billion"] = solve / parameters * 1e9 / 3600
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
