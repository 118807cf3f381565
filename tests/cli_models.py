"""The command line as the tests call it, and model directories with tokenizers; all random, nothing downloaded."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from typer.testing import CliRunner

from zeroskip.cli import app

SOME = "return the a list of in order name key file item open read line raise an error"
WORDS = [*SOME.split(" "), *(f"word{number}" for number in range(30))]


def cli(*words, **options):
    """Run the command line in this process."""
    return CliRunner().invoke(app, [str(word) for word in words], **options)


def refused(*words, **options):
    """Run it, check that it was refused as bad input in one line, and return the line."""
    result = cli(*words, **options)
    *steps, line = result.stderr.splitlines()
    assert result.exit_code == 2, result.stderr
    assert line.startswith("zeroskip: "), result.stderr
    assert not any(step.startswith("zeroskip: ") or "Traceback" in step for step in steps)
    return line


def zeroskip_process(*words, script=None, **environment):
    """Start the command line in a process of its own."""
    what = ["-c", script] if script else ["-m", "zeroskip", *map(str, words)]
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, *what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | environment,
        preexec_fn=hears_ctrl_c,
    )


def hears_ctrl_c():
    """In the child: a suite that runs in the background of a script would hand down that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def shorter(race):
    """The race with next to no time."""
    return lambda runners, **given: race(runners, **given | {"budget_s": 0.01, "min_rounds": 1})


def shorten_races(monkeypatch) -> None:
    """Let compilation time little, for tests where it does not matter what wins."""
    from zeroskip.planning import break_even, measure, siblings, whole

    for module in (break_even, measure, siblings, whole):
        monkeypatch.setattr(module, "race", shorter(module.race))


def write_tokenizer(directory: Path, special: list[str]) -> int:
    """Write a word-level tokenizer; return the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    unknown = special[1]
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": special[0], "unk_token": unknown}
    if "[CLS]" in special:
        pair = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=pair)
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    else:
        names["eos_token"] = special[2]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names).save_pretrained(directory)
    return len(vocabulary)


def write_encoder(directory: Path, hidden: int = 64, layers: int = 2) -> Path:
    """A BertModel whose linear layers hold any of the patterns (all sizes are multiples of 64)."""
    from transformers import BertConfig, BertModel

    size = write_tokenizer(directory, ["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(directory)
    return directory


def write_decoder(directory: Path) -> Path:
    """A small LlamaForCausalLM."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = write_tokenizer(directory, ["<pad>", "<unk>", "<eos>"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def write_endless(directory: Path, context: int = 2048) -> Path:
    """A small LlamaForCausalLM with a long context and no token that ends an answer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = write_tokenizer(directory, ["<pad>", "<unk>", "<eos>"])
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        eos_token_id=None,
        initializer_range=0.2,  # far from level logits
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory
