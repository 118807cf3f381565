"""A target in milliseconds: prune to it, compile, measure again, compare.

    python benchmarks/budget_ms.py DATA/pylm15m --text DATA/pylm15m/calibration.json.gz --percent 85 70 --json out.json

For each target the model is loaded anew, pruned so that its linear layers take that part of their dense time, compiled
for the same token count, and then all layers are run one after another, sparse and dense copies in turns, each on its
own activations. Printed: the target, what the budget predicted, what `compile` measured layer by layer, and what the
layers took in that last run, each also as a part of what the dense layers took in the same measurement: on a machine
that does other things too, only these parts can be compared. With one thread the last run is timed by the clock of the
processor, which stands still while others have it.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zeroskip
from zeroskip.bench.timer import race
from zeroskip.calibrate import strings_of


def one(arguments: argparse.Namespace, percent: float, budget: str) -> dict[str, Any]:
    """Prune, compile and measure once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    target = {"ms": f"{percent:g}%", "tokens": arguments.tokens, "threads": arguments.threads}
    if arguments.precision:
        target["precision"] = arguments.precision
    dense = copy.deepcopy(model)
    report = zeroskip.prune(
        model,
        arguments.method,
        pattern=arguments.pattern,
        budget=budget,
        target=target,
        text=strings_of(arguments.text)[: arguments.strings],
        tokenizer=tokenizer,
    )
    names = [row.name for row in report.rows] + [n for n, why in report.skipped.items() if why.endswith("the budget")]
    zeroskip.compile(model, tokens=arguments.tokens, precision=arguments.precision)
    plan = {site.name: site for site in zeroskip.plan_of(model).sites}
    by_layer = sum(plan[name].time_ms(plan[name].label, arguments.tokens) for name in names)
    dense_labels = ("linear", "onednn", "dense")
    best_dense = sum(
        min(plan[n].time_ms(label, arguments.tokens) for label in plan[n].times_ms if label.split()[0] in dense_labels)
        for n in names
    )
    zeroskip.compile(dense, tokens=arguments.tokens, precision=arguments.precision)
    sides = {
        "sparse": pass_through(model, names, arguments.tokens),
        "dense": pass_through(dense, names, arguments.tokens),
    }
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    seen = race({side: [call] for side, call in sides.items()}, budget_s=arguments.seconds, clock=clock)
    account = report.budget or {}
    return {
        "budget": budget,
        "percent": percent,
        "sparsity": report.sparsity,
        "layers_dense": sum(site.format in ("linear", "onednn", "dense") for n, site in plan.items() if n in names),
        "asked_ms": account["asked"],
        "predicted_ms": account["reached"],
        "compiled_ms": by_layer,
        "passed_ms": seen.median("sparse") * 1e3,
        "dense_then_ms": account["dense"],
        "dense_compiled_ms": best_dense,
        "dense_passed_ms": seen.median("dense") * 1e3,
    }


def pass_through(model: nn.Module, names: list[str], tokens: int) -> Callable[[], object]:
    """Return one run of all these layers, in order."""
    layers = [model.get_submodule(name) for name in names]
    inputs = [torch.randn(tokens, layer.in_features) for layer in layers]

    def run() -> None:
        with torch.inference_mode():
            for layer, x in zip(layers, inputs, strict=True):
                layer(x)

    return run


def line(r: dict[str, Any]) -> str:
    """One result in words; in brackets how far the part of the dense time is from the part that was asked."""
    asked = r["asked_ms"] / r["dense_then_ms"]
    parts = [
        f"{stage} {r[f'{stage}_ms']:.3f} of {r[f'dense_{stage}_ms']:.3f} ms"
        f" ({r[f'{stage}_ms'] / r[f'dense_{stage}_ms'] / asked - 1:+.1%})"
        for stage in ("compiled", "passed")
    ]
    return (
        f"{r['budget']} {r['percent']:g} %: asked {r['asked_ms']:.3f} of {r['dense_then_ms']:.3f} ms, "
        f"predicted {r['predicted_ms']:.3f}, {', '.join(parts)}; sparsity {r['sparsity']:.3f}, "
        f"{r['layers_dense']} layers dense"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="to calibrate on")
    parser.add_argument("--strings", type=int, help="of the text, at most; a mean of squares needs few")
    parser.add_argument("--percent", nargs="+", type=float, default=[85, 70])
    parser.add_argument("--budgets", nargs="+", default=["uniform", "global"], choices=zeroskip.budgets())
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--pattern", default="unstructured")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default=None)
    parser.add_argument("--seconds", type=float, default=5.0, help="of the last comparison")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for percent in arguments.percent:
        for budget in arguments.budgets:
            results.append(one(arguments, percent, budget))
            sys.stdout.write(line(results[-1]) + "\n")
            sys.stdout.flush()
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
