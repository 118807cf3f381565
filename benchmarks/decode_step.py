"""Where a decode step of a compiled model goes, with and without its decoder layers as calls of the core.

    python benchmarks/decode_step.py DIR [--tokens 128] [--threads 2] [--compiled]

DIR is what `zeroskip compile` or `zeroskip bench llm --work` has written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import zeroskip as zs
from zeroskip.bench.llm_models import prompt
from zeroskip.bench.llm_profile import profile_step
from zeroskip.bench.llm_steps import PROFILE_LEGEND, profile_table
from zeroskip.hf_layers import attach_layers, detach_layers

WAYS: dict[str, Callable[[nn.Module], None]] = {"own forward": detach_layers, "one call": attach_layers}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("model", type=Path)
    words.add_argument("--tokens", type=int, default=128)
    words.add_argument("--threads", type=int, default=torch.get_num_threads())
    words.add_argument("--compiled", action="store_true")
    given = words.parse_args()
    torch.set_num_threads(given.threads)
    model = zs.load(given.model)
    ids = prompt(model, given.tokens, 1)
    found = []
    for turn in range(2):
        for name, set_up in WAYS.items():
            set_up(model)
            found.append(profile_step(f"{name} {turn + 1}", model, ids, given.compiled))
    sys.stdout.write("\n".join([*profile_table(found), *PROFILE_LEGEND]) + "\n")


if __name__ == "__main__":
    main()
