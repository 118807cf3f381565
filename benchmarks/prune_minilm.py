"""What more a sentence encoder in strips keeps of its recall: the demo's task, other ways to prune for it.

    python benchmarks/prune_minilm.py --seeds 0 1 2 --variants demo whole --json out.json

Variants, all in 8:16@64: `demo` prunes as the demo does (obs+tune, values rotated, 2,700 texts); `whole` goes on from
there and tunes all layers at once (below); `obs` and `permute` leave tuning out, without and with channels permuted;
`long` tunes the blocks on all texts of the calibration modules. Results already in the JSON file are not measured
again.

Tuning all layers at once: one pass over every text of the calibration modules and the first paragraphs of these texts,
for short ones are what the task asks with. The loss of a batch is that of the last hidden states, |y - t|^2 / |t|^2 a
token, and 1 - cosine of the sentence vectors, t from the dense model. Zeros stay zeros.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zeroskip
from zeroskip.demo import data, task
from zeroskip.demo.run import BATCH, PATTERN, TEXTS, model_directory
from zeroskip.model import find_sites

STEP = 0.01  # of a matrix's root mean square
VECTOR_STEP = 0.001
WARM_UP = 20
TOGETHER = 16  # texts of one step
METHODS = {
    "demo": ("obs+tune", False, TEXTS),
    "long": ("obs+tune", False, 10**6),
    "obs": ("obs", False, TEXTS),
    "permute": ("obs", True, TEXTS),
}


def pruned(model: nn.Module, tokenizer: Any, variant: str, seed: int) -> nn.Module:
    """Prune a copy of the model."""
    method, permute, texts = METHODS[variant]
    given = task.tokenized(tokenizer, data.split(seed, texts=texts).calibration, batch_size=BATCH)
    model = copy.deepcopy(model)
    zeroskip.prune(model, method, pattern=PATTERN, rotate=True, permute=permute, calibration=given, seed=seed)
    return model


def tune_whole(model: nn.Module, dense: nn.Module, batches: Sequence[dict[str, Tensor]], seed: int) -> None:
    """Tune all layers of `model` at once, one pass, towards `dense`."""
    weights = [(site.module.weight, site.module.weight == 0) for site in find_sites(model)]
    matrices = {id(weight) for weight, _ in weights}
    learning = [each for each in model.parameters() if id(each) in matrices or each.dim() == 1]
    groups = [{"params": [each], "lr": 0.0, "full": step_of(each)} for each in learning]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.95))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in learning:
        parameter.requires_grad_(True)
    order = list(range(len(batches)))
    random.Random(seed).shuffle(order)
    for at, index in enumerate(order):
        part = min(1.0, (at + 1) / WARM_UP) * (1 + math.cos(math.pi * at / len(order))) / 2
        for group in adam.param_groups:
            group["lr"] = group["full"] * part
        batch = batches[index]
        with torch.no_grad():
            wanted = dense(**batch)[0]
        adam.zero_grad()
        loss(model(**batch)[0], wanted, batch["attention_mask"]).backward()
        for weight, zero in weights:
            if weight.grad is not None:
                weight.grad.masked_fill_(zero, 0.0)
        adam.step()


def step_of(parameter: Tensor) -> float:
    """Return the largest step of Adam for this parameter."""
    size = math.sqrt(float(parameter.detach().square().sum()) / max(1, int((parameter != 0).sum())))
    return STEP * size if parameter.dim() > 1 else VECTOR_STEP * max(size, 1.0)


def loss(output: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """Distance of tokens and of sentence vectors; [texts, tokens, hidden] and [texts, tokens]."""
    there = mask.bool()
    tokens = ((output - wanted).square().sum(-1) / wanted.square().sum(-1))[there].mean()
    share = mask / mask.sum(1, keepdim=True)
    ours, theirs = (torch.einsum("bth,bt->bh", hidden, share) for hidden in (output, wanted))
    return tokens + (1 - nn.functional.cosine_similarity(ours, theirs)).mean()


def texts_of(seed: int) -> list[str]:
    """All texts of the calibration modules, and their first paragraphs where they have more than one."""
    whole = data.split(seed, texts=10**6).calibration
    first = [text.split("\n\n")[0] for text in whole if "\n\n" in text.strip()]
    return whole + [text for text in dict.fromkeys(first) if len(text) >= data.QUERY_CHARS[0]]


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=["demo", "whole"], choices=[*METHODS, "whole"])
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
        demos: nn.Module | None = None
        for variant in arguments.variants:
            key = f"{variant} {seed}"
            if key in results:
                continue
            started = time.process_time()
            if variant == "whole":
                model = demos if demos is not None else pruned(dense, tokenizer, "demo", seed)
                tune_whole(model, dense, task.tokenized(tokenizer, texts_of(seed), batch_size=TOGETHER), seed)
            else:
                model = pruned(dense, tokenizer, variant, seed)
                demos = model if variant == "demo" else demos
            seconds = time.process_time() - started
            found = task.recall(model, tokenizer, pairs)
            results[key] = {f"kept_{k}": found.kept(at_best, k) for k in (1, 10)} | {"seconds": seconds}
            arguments.json.write_text(json.dumps(results, indent=1))
            sys.stdout.write(f"{key}: {json.dumps(results[key])}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
