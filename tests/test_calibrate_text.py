"""Calibration batches from text."""

import pytest
import torch
from tiny_models import bert, llama, t5

from zeroskip.calibrate import text_batches
from zeroskip.errors import ZeroskipError
from zeroskip.prune import prune

WORDS = ["a", "model", "goes", "in", "and", "a", "sparse", "model", "that", "is", "never", "slower", "comes", "out"]


def tokenizer(encoder: bool):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<end>"]
    words = {word: index for index, word in enumerate([*special, *dict.fromkeys(WORDS)])}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if not encoder:
        return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")


def test_a_decoder_gets_full_windows_with_the_end_after_every_string():
    given = text_batches(llama(), [" ".join(WORDS)] * 10, tokenizer(False), tokens=32)
    rows = torch.cat([batch["input_ids"] for batch in given])
    assert rows.shape == (10 * 15 // 32, 32)
    assert (rows.flatten()[14::15] == 4).all()
    short = text_batches(llama(), ["a sparse model"], tokenizer(False))
    assert short[0]["input_ids"].shape == (1, 4)
    long = text_batches(llama(), [" ".join(WORDS)] * 2000, tokenizer(False))
    assert sum(len(batch["input_ids"]) for batch in long) == 128 and long[0]["input_ids"].shape[1] == 64


def test_an_encoder_gets_one_padded_row_a_string(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a sparse model\n\n" + " ".join(WORDS) + "\n \nslower\n")
    (batch,) = text_batches(bert(), path, tokenizer(True))
    assert batch["input_ids"].shape == (3, 16)
    assert batch["attention_mask"].sum(1).tolist() == [3, 5, 16]
    assert (batch["input_ids"] == 2).sum(1).tolist() == [1, 1, 1]


def test_prune_takes_text(tmp_path):
    model = bert()
    report = prune(model, sparsity=0.5, text=[" ".join(WORDS), "never slower"], tokenizer=tokenizer(True))
    assert {row.tokens for row in report.rows} == {20}


@pytest.mark.parametrize(
    ("model", "text", "message"),
    [
        (llama, [], "no text"),
        (llama, ["  "], "no text"),
        (llama, [3], "no string"),
        (llama, "missing.txt", "no readable UTF-8 file"),
        (t5, ["a"], "encoder-decoder"),
    ],
)
def test_bad_text_gets_one_line(model, text, message):
    with pytest.raises(ZeroskipError, match=message):
        text_batches(model(), text, tokenizer(False))
