"""Held-out perplexity of pylm15m after pruning: methods x sparsities, with time and peak memory.

    python benchmarks/prune_pylm.py DATA/pylm15m --methods wanda+ls admm --cells 50 2:4 --json out.json --markdown

Every cell runs in a process of its own, so its peak memory is its own. Cells already in the JSON file are not run
again. "permute:METHOD" permutes channels first; "default" stands for the method that `prune` takes for the pattern
where none is named, and becomes its name in table and file; --recipes measures recipes instead, with other settings
where they are named as in "llm-int4-50,group_size=32" or "llm-int4-50,embeddings=int4". Perplexity as the
data's README defines it: windows of 256 tokens, the first of a window not scored, fp32. Calibration: the first 64
windows of 256 tokens of the calibration text.
Seconds are those of the processor, so that they hold on a machine that does other things too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from zeroskip.calibrate import strings_of, token_stream
from zeroskip.prune import Pattern
from zeroskip.prune.recipe import default_method
from zeroskip.quality.perplexity import perplexity, windows

CELLS = {
    "50": ("unstructured", 0.5),
    "60": ("unstructured", 0.6),
    "70": ("unstructured", 0.7),
    "2:4": ("2:4", None),
    "2:4@64": ("2:4@64", None),
    "8:16@64": ("8:16@64", None),
}
WINDOW = 256
SEQUENCES = 64


def calibration(folder: Path, tokenizer: Any, batch: int) -> list[dict[str, torch.Tensor]]:
    """Return the first 64 windows of the calibration text."""
    stream = token_stream(strings_of(folder / "calibration.json.gz"), tokenizer)
    return [{"input_ids": part} for part in windows(stream, WINDOW, WINDOW)[:SEQUENCES].split(batch)]


def cell(folder: Path, method: str, which: str, threads: int, batch: int) -> dict[str, float]:
    """Prune and score in this process."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import zeroskip

    def held() -> float:
        return perplexity(model, folder / "heldout.json.gz", tokenizer, context=WINDOW).value

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if method == "dense":
        return {"perplexity": held()}
    batches = calibration(folder, tokenizer, batch)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if method == "recipe":
        name, *settings = which.split(",")
        given: dict[str, Any] = dict(part.split("=") for part in settings)
        if "group_size" in given:
            given["group_size"] = int(given["group_size"])
        report = zeroskip.prune(model, recipe=name, calibration=batches, **given)
    else:
        pattern, sparsity = CELLS.get(which, (which, None))
        asked = {"pattern": pattern, "sparsity": sparsity, "permute": method.startswith("permute:")}
        report = zeroskip.prune(model, method.removeprefix("permute:"), **asked, calibration=batches)
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "perplexity": held(),
        "seconds": round(seconds, 1),
        "solve_seconds": round(sum(row.seconds for row in report.rows), 1),
        "peak_mb": peak // 1024,
        "over_model_mb": (peak - before) // 1024,
        "sparsity": report.sparsity,
    }


def named(method: str, which: str) -> str:
    """The method that "default" stands for; any other name as it is."""
    return default_method(Pattern.parse(CELLS.get(which, (which,))[0])) if method == "default" else method


def _child(pipe: Any, *arguments: Any) -> None:
    try:
        pipe.send(cell(*arguments))
    except ValueError as error:  # a method that cannot serve the pattern says so
        pipe.send({"refused": str(error)})


def isolated(*arguments: Any) -> dict[str, float]:
    """`cell` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, *arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return {"refused": f"the process ended with {process.exitcode}"}
    finally:
        process.join()


def markdown(results: dict[str, dict[str, float]], dense: float) -> str:
    """The table of docs/pruning.md."""
    names = dict.fromkeys(key.split(" ")[0] for key in results if key.partition(" ")[2] in CELLS)
    lines = ["| method | " + " | ".join(f"{c} %" if c.isdigit() else c for c in CELLS) + " | s | peak MB |"]
    lines.append("|---" * (len(CELLS) + 3) + "|")
    for name in names:
        row = [results.get(f"{name} {c}", {}) for c in CELLS]
        figures = [f"{r['perplexity']:.2f}" if "perplexity" in r else "-" if "refused" in r else "" for r in row]
        seconds = [r["seconds"] for r in row if "seconds" in r]
        memory = [r["peak_mb"] for r in row if "peak_mb" in r]
        spread = "-".join(dict.fromkeys(f"{each:.0f}" for each in (min(seconds), max(seconds)))) if seconds else ""
        lines.append(f"| `{name}` | " + " | ".join(figures) + f" | {spread} | {max(memory, default=0):.0f} |")
    return "\n".join([f"Dense: {dense:.2f}.", "", *lines])


def main() -> None:
    from zeroskip.prune import methods

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="+", default=[name for name in methods() if not name.startswith("gptq")])
    parser.add_argument("--recipes", nargs="+", default=[], help="recipes, instead of methods and cells")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), help=f"of {', '.join(CELLS)}; or patterns")
    parser.add_argument("--json", type=Path, default=Path("prune_pylm.json"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="windows of one calibration batch; a step of +tune each")
    parser.add_argument("--markdown", action="store_true", help="print the table when all is done")
    arguments = parser.parse_args()
    results = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    cells = [f"{named(method, which)} {which}" for which in arguments.cells for method in arguments.methods]
    for key in ["dense", *([f"recipe {name}" for name in arguments.recipes] or dict.fromkeys(cells))]:
        if key in results:
            continue
        method, _, which = key.partition(" ")
        results[key] = isolated(arguments.folder, method, which, arguments.threads, arguments.batch)
        arguments.json.write_text(json.dumps(results, indent=1))
        sys.stderr.write(f"{key} {json.dumps(results[key])}\n")
    if arguments.markdown:
        sys.stdout.write(markdown(results, results["dense"]["perplexity"]) + "\n")


if __name__ == "__main__":
    main()
