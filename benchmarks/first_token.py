"""How soon a large directory answers, and that processes share its weights: two processes load and generate.

    python benchmarks/first_token.py --work /big/disk/folder [--gigabytes 1.0] [--processes 2] [--json PATH]

The model is a Llama of random 8-bit weights (hidden 2048, FFN 8192, vocabulary 32000) with as many layers as fill the
size asked for; it is written once and reused. Each process imports torch and transformers, then notes the seconds to
the loaded model and to the first token after a prompt of 8. They stay until all have answered; then the kernel says
what is resident in each (Rss) and each one's share of it (Pss: a page that n processes map counts 1/n), of the whole
process and of the mapped weight files alone, and how much of those a process has copied (own).
The first process after writing finds the files in the page cache: from a cold disk add the time it takes to read them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CHILD = """
import json, sys, time
import torch, transformers
from transformers import LlamaForCausalLM
from transformers.generation.utils import GenerationMixin
import zeroskip
torch.set_num_threads(int(sys.argv[2]))
ids = torch.arange(8).unsqueeze(0) + 5
begun = time.perf_counter()
model = zeroskip.load(sys.argv[1])
loaded = time.perf_counter()
with torch.inference_mode():
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
first = time.perf_counter()
print(json.dumps({"load_s": loaded - begun, "first_token_s": first - begun}), flush=True)
sys.stdin.readline()
"""


def write(folder: Path, gigabytes: float) -> None:
    """Store a compiled model of about this size; every layer of a shape has the same random weight."""
    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM

    import zeroskip
    from zeroskip.nn import PackedLinear
    from zeroskip.planning.install import put_all

    block = 2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 2048 * 8192  # weights; one byte each, and a scale for 64
    rest = 32000 * 2048 * (2 + 1)  # embeddings in bf16, the head in 8 bits
    layers = max(1, round((gigabytes * 1e9 - rest) / (block * 66 / 64)))
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    packed: dict[tuple[int, int], Any] = {}
    pairs = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            shape = (module.out_features, module.in_features)
            if shape not in packed:
                packed[shape] = zeroskip.pack(torch.randn(shape) * shape[1] ** -0.5, "dense", values="int8")
            layer = PackedLinear.from_packed(packed[shape], None, None)
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
            pairs.append((module, layer))
    put_all(model, pairs)
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None and value.is_meta:
                made = torch.ones(value.shape) if value.dim() == 1 else torch.randn(value.shape)
                module._parameters[name] = nn.Parameter(made.to(value.dtype), requires_grad=False)
    zeroskip.save(model, folder)


def memory(pid: int, folder: Path) -> dict[str, float]:
    """Return MB of a process: resident and its share, of everything and of the mapped files of `folder`."""
    found = dict.fromkeys(("rss", "pss", "weights_rss", "weights_pss", "weights_own"), 0.0)
    ours = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            ours = str(folder) in rest
            continue
        size = int(rest.split()[0]) / 1e3 * 1.024 if rest.split()[-1] == "kB" else 0.0
        key = {"Rss:": "rss", "Pss:": "pss"}.get(first)
        if key is not None:
            found[key] += size
            found[f"weights_{key}"] += size if ours else 0.0
        if first == "Anonymous:" and ours:
            found["weights_own"] += size
    return {name: round(value, 1) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    folder = asked.work.resolve() / f"llama-{asked.gigabytes:g}gb"
    if not folder.exists():
        write(folder, asked.gigabytes)
    size = sum(file.stat().st_size for file in folder.iterdir())
    words = [sys.executable, "-c", CHILD, str(folder), str(asked.threads)]
    children, told = [], []
    for _ in range(asked.processes):  # one after the other: nobody times a machine that others keep busy
        child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        told.append(json.loads(child.stdout.readline()))
        children.append(child)
    time.sleep(0.5)
    for child, each in zip(children, told, strict=True):
        each |= memory(child.pid, folder)
    for child in children:
        child.communicate("\n")
    result = {"bytes": size, "processes": told}
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
