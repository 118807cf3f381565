"""What more a sentence encoder in strips keeps of its recall: the demo's task, other ways to prune for it.

    python benchmarks/prune_minilm.py --seeds 0 1 2 --variants demo distill --json out.json

Variants, all in 8:16@64 with values rotated: `demo` prunes as the demo does (obs+tune, 2,700 texts); `distill` goes on
with all layers at once (obs+tune+distill), and calibrates on the first paragraphs of these texts too, for short ones
are what the task asks with; `distill-all` does so with all texts of the calibration modules; `obs` and `permute` leave
tuning out, without and with channels permuted; `long` tunes the blocks on all texts. Results already in the JSON file
are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zeroskip
from zeroskip.demo import data, task
from zeroskip.demo.run import BATCH, METHOD, PATTERN, TEXTS, model_directory

ALL = 10**6  # texts: more than there are
VARIANTS = {
    "demo": {"method": METHOD},
    "distill": {"method": f"{METHOD}+distill", "paragraphs": True},
    "distill-all": {"method": f"{METHOD}+distill", "texts": ALL, "paragraphs": True},
    "long": {"method": METHOD, "texts": ALL},
    "obs": {"method": "obs"},
    "permute": {"method": "obs", "permute": True},
}


def pruned(model: nn.Module, tokenizer: Any, variant: str, seed: int) -> nn.Module:
    """Prune a copy of the model."""
    asked = dict(VARIANTS[variant])
    texts = texts_of(seed, asked.pop("texts", TEXTS), asked.pop("paragraphs", False))
    given = task.tokenized(tokenizer, texts, batch_size=BATCH)
    model = copy.deepcopy(model)
    zeroskip.prune(model, **asked, pattern=PATTERN, rotate=True, calibration=given, seed=seed)
    return model


def texts_of(seed: int, count: int, paragraphs: bool) -> list[str]:
    """So many texts of the calibration modules, and their first paragraphs where they have more than one."""
    texts = data.split(seed, texts=count).calibration
    first = [text.split("\n\n")[0] for text in texts if paragraphs and "\n\n" in text.strip()]
    return texts + [text for text in dict.fromkeys(first) if len(text) >= data.QUERY_CHARS[0]]


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=["demo", "distill"], choices=VARIANTS)
    parser.add_argument("--json", type=Path, default=Path("prune_minilm.json"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    source = model_directory()
    dense, tokenizer = zeroskip.load(source).float().eval(), AutoTokenizer.from_pretrained(source)
    for seed in arguments.seeds:
        pairs = data.split(seed).pairs
        at_best = task.recall(dense, tokenizer, pairs)
        for variant in arguments.variants:
            key = f"{variant} {seed}"
            if key in results:
                continue
            started = time.process_time()
            model = pruned(dense, tokenizer, variant, seed)
            seconds = time.process_time() - started
            found = task.recall(model, tokenizer, pairs)
            results[key] = {f"kept_{k}": found.kept(at_best, k) for k in (1, 10)} | {"seconds": seconds}
            arguments.json.write_text(json.dumps(results, indent=1))
            sys.stdout.write(f"{key}: {json.dumps(results[key])}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
