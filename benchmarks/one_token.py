"""One token, weights from memory: our kernels against the read bandwidth, torch, oneDNN and other libraries.

    python benchmarks/one_token.py --threads 1,2 --sparsity 0.5 --peers onnxruntime,llama_cpp

A race as `zeroskip bench kernels` runs it, of one shape and only the layouts that matter here, so that there is memory
for copies of `--cold-mb` of each; the bandwidth is measured on a buffer of that size. With several sparsities it also
tells from how many zeros on `bitmask` beats our dense layout of the same values.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace

import torch

from zeroskip.bench.contest import Contest
from zeroskip.bench.peers.environments import choose
from zeroskip.bench.peers.remote import PeerProcess
from zeroskip.bench.results import KernelTable
from zeroskip.bench.roofline import roofline
from zeroskip.bench.suites import Case, Zeros
from zeroskip.planning.candidates import Layout
from zeroskip.planning.machine import this_machine

LABELS = (
    "linear bf16",
    "onednn bf16",
    *(f"{kind} {of}" for kind in ("dense", "bitmask") for of in ("bf16", "int8", "int4")),
)
PARAMETERS = 1 << 40  # of the model: as many copies as `cold_bytes` asks for


class Few(Contest):
    """A contest of LABELS alone, each with the kernel of the best row."""

    def _layouts(self, formats: Collection[str]) -> list[Layout]:
        found = super()._layouts(formats)
        return [replace(layout, kernels=layout.kernels[:1]) for layout in found if layout.label in LABELS]


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x4096", help="outputs x inputs")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--threads", type=numbers, default=(1.0, 2.0))
    parser.add_argument("--sparsity", type=numbers, default=(0.5,), help="fractions of zeros")
    parser.add_argument("--peers", default="none", help="auto, none, or names with commas")
    parser.add_argument("--cold-mb", type=int, default=420, help="copies of each layout, and the buffer that is read")
    parser.add_argument("--race", type=float, default=2.0, help="seconds of each race")
    given = parser.parse_args()
    m, k = map(int, given.shape.split("x"))
    cold = given.cold_mb << 20
    found = KernelTable("one token", str(this_machine()), vars(given))
    with ExitStack() as stack:
        peers = {name: stack.enter_context(PeerProcess(name)) for name in choose(given.peers)}
        found.peers = {name: process.version() for name, process in peers.items()}
        for threads in map(int, given.threads):
            torch.set_num_threads(threads)
            found.rooflines.append(roofline(sizes={"memory": cold}))
        for sparsity in given.sparsity:
            contest = Few(Case("layer", m, k, Zeros("unstructured", sparsity), PARAMETERS), (), cold, given.race, peers)
            for threads in map(int, given.threads):
                torch.set_num_threads(threads)
                found.rows += contest.rows(given.tokens, found.roofline(threads))
            contest.close()
    sys.stdout.write(f"{found}\n")


if __name__ == "__main__":
    main()
