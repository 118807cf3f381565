"""Prune and compile any transformers encoder or decoder: `python examples/prune_and_compile.py MODEL TEXT OUT`."""

import sys

from transformers import AutoTokenizer

import zeroskip as zs


def main(name: str, text: str, out: str) -> None:
    model, tokenizer = zs.load(name), AutoTokenizer.from_pretrained(name)
    report = zs.prune(model, "wanda+ls", pattern="8:16@64", text=text, tokenizer=tokenizer)
    sys.stdout.write(f"{report}\n\n")

    # Be good at one token, at a short text and at a batch of 64 sentences; bf16 may be used where that is faster.
    model = zs.compile(model, tokens=(1, 128, 8192), precision="bf16")
    sys.stdout.write(f"{zs.plan_of(model)}\n")
    zs.save(model, out, tokenizer=tokenizer)


if __name__ == "__main__":
    main(*sys.argv[1:])
