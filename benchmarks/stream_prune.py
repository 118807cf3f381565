"""How much memory `zeroskip prune` takes on a model that does not fit in it: random weights of an 8 B-parameter Llama.

    python benchmarks/stream_prune.py FOLDER --layers 32

writes FOLDER/model (shard by shard, never the whole model in memory) if it is not there, then runs

    zeroskip prune FOLDER/model FOLDER/out --method wanda --pattern 2:4 --calibration ... --no-speed --no-quality

and samples the process twice a second. Anonymous memory is what the process cannot give back; pages of mapped files
are reclaimed by the kernel whenever something else needs the room. Needs disk for the model twice.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

SIZES = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}


def write_model(folder: Path, layers: int) -> int:
    """Write random bf16 weights, a shard for every block; return how many."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from zeroskip.io import container

    config = LlamaConfig(**SIZES, num_hidden_layers=layers, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    draw = torch.Generator().manual_seed(0)

    def make(name: str) -> torch.Tensor:
        shape = shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=draw)

    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(".".join(name.split(".")[:3]) if ".layers." in name else name, []).append(name)
    where = {}
    for index, names in enumerate(shards.values(), 1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors"
        container.write(folder / file, {name: make(name) for name in names}, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    total = sum(shape.numel() for shape in shapes.values())
    index_file = {"metadata": {"total_size": 2 * total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return total


def watch(process: subprocess.Popen[bytes]) -> dict[str, int]:
    """Return the largest amounts of memory, in bytes, that the process held while it ran."""
    most = {"RssAnon": 0, "RssFile": 0, "VmHWM": 0}
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            break
        for line in lines:
            name, _, value = line.partition(":")
            if name in most:
                most[name] = max(most[name], 1024 * int(value.split()[0]))
        time.sleep(0.5)
    return most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="calibration tokens, in one row")
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--pattern", default="2:4")
    given = parser.parse_args()
    import torch
    from safetensors.torch import save_file

    model, out = given.folder / "model", given.folder / "out"
    if not model.exists():
        total = write_model(model, given.layers)
        sys.stdout.write(f"wrote {total / 1e9:.2f} B parameters\n")
    ids = torch.randint(0, SIZES["vocab_size"], (1, given.tokens), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, given.folder / "ids.safetensors")
    command = [sys.executable, "-m", "zeroskip", "prune", model, out, "--method", given.method]
    command += ["--pattern", given.pattern, "--calibration", given.folder / "ids.safetensors"]
    started = time.monotonic()
    process = subprocess.Popen([*map(str, command), "--no-speed", "--no-quality"], stdout=subprocess.DEVNULL)
    most = watch(process)
    seconds = time.monotonic() - started
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    sys.stdout.write(
        f"{given.method} {given.pattern}: {size / 1e9:.2f} GB of weights, {seconds:.0f} s, peak "
        f"{most['RssAnon'] / 1e9:.2f} GB anonymous, {most['RssFile'] / 1e9:.2f} GB of mapped files, "
        f"{most['VmHWM'] / 1e9:.2f} GB resident in all\n"
    )
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
