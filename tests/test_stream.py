"""Pruning with one block in memory: the same bits, finished blocks mapped from the journal and linked as shards."""

import json
import os
from pathlib import Path

import pytest
import torch
from cli_models import cli
from tiny_models import MODELS, batches

import zeroskip
from zeroskip.errors import ZeroskipError
from zeroskip.io.load import weight_files
from zeroskip.model import find_sites


def mapped_from(tensor):
    """The file in which a tensor lies, or None."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *rest = line.split(maxsplit=5)
        begin, end = (int(part, 16) for part in span.split("-"))
        if begin <= tensor.data_ptr() < end:
            return rest[4] if len(rest) == 5 and rest[4].startswith("/") else None
    return None


def alike(one, other):
    want, got = one.state_dict(), other.state_dict()
    return want.keys() == got.keys() and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("kind", "method"),
    [("llama", "wanda+ls"), ("llama", "sparsegpt+gptq"), ("bert", "wanda+ls+tune"), ("t5", "magnitude")],
)
def test_the_result_is_that_of_pruning_in_memory(tmp_path, kind, method):
    given = {"pattern": "2:4", "calibration": batches(kind, 2)}
    zeroskip.save(MODELS[kind](), tmp_path / "dense")
    whole, streamed = zeroskip.load(tmp_path / "dense"), zeroskip.load(tmp_path / "dense")
    first = zeroskip.prune(whole, method, **given)
    second = zeroskip.prune(streamed, method, **given, journal=tmp_path / "journal", stream=True)
    assert alike(whole, streamed) and [row.error for row in first.rows] == [row.error for row in second.rows]
    done = {row.name for row in first.rows}
    for one, two in zip(find_sites(whole), find_sites(streamed), strict=True):
        assert ("/journal/" in mapped_from(two.tensor)) == (two.name in done)
        assert "/journal/" not in str(mapped_from(one.tensor))
        assert (one.scales is None) == (two.scales is None)
        assert one.scales is None or torch.equal(one.scales, two.scales)

    blocks = sorted((tmp_path / "journal").glob("0*.safetensors"))
    zeroskip.save(streamed, tmp_path / "out", ready=blocks)
    zeroskip.save(whole, tmp_path / "plain")
    links = [path for path in weight_files(tmp_path / "out") if path.stat().st_nlink == 2]
    assert len(links) == len(blocks) > 1 and len(weight_files(tmp_path / "out")) == len(blocks) + 1
    assert alike(zeroskip.load(tmp_path / "out"), zeroskip.load(tmp_path / "plain"))
    assert alike(type(whole).from_pretrained(tmp_path / "out"), whole)


def test_memory_that_was_never_written_to_stays_with_the_file(tmp_path):
    zeroskip.save(MODELS["llama"](), tmp_path / "dense")
    model = zeroskip.load(tmp_path / "dense")
    zeroskip.prune(model, "magnitude", pattern="2:4", journal=tmp_path / "journal", stream=True)
    assert "/dense/" in mapped_from(model.get_input_embeddings().weight)


def test_only_files_that_hold_the_very_same_tensors_are_linked(tmp_path):
    model = MODELS["llama"]()
    zeroskip.prune(model, "magnitude", pattern="2:4", journal=tmp_path / "journal", stream=True)
    blocks = sorted((tmp_path / "journal").glob("0*.safetensors"))
    with torch.no_grad():
        find_sites(model)[0].tensor[0, 0] += 1
    zeroskip.save(model, tmp_path / "out", ready=blocks)
    assert [path.stat().st_nlink for path in weight_files(tmp_path / "out")].count(2) == 2
    assert alike(zeroskip.load(tmp_path / "out"), model)
    zeroskip.save(model.half(), tmp_path / "half", ready=blocks)
    assert alike(zeroskip.load(tmp_path / "half"), model)


def test_a_disk_without_links_gets_copies(tmp_path, monkeypatch):
    model = MODELS["llama"]()
    zeroskip.prune(model, "magnitude", pattern="2:4", journal=tmp_path / "journal", stream=True)

    def link(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    zeroskip.save(model, tmp_path / "out", ready=sorted((tmp_path / "journal").glob("0*.safetensors")))
    assert all(path.stat().st_nlink == 1 for path in weight_files(tmp_path / "out"))
    assert alike(zeroskip.load(tmp_path / "out"), model)


def test_it_needs_a_journal():
    with pytest.raises(ZeroskipError, match="give journal="):
        zeroskip.prune(MODELS["llama"](), "magnitude", pattern="2:4", stream=True)


def test_the_command_line_streams(encoder, text, tmp_path):
    out = tmp_path / "out"
    run = cli("prune", encoder, out, "--pattern", "2:4", "--text", text, "--no-speed", "--json", tmp_path / "r.json")
    assert run.exit_code == 0, run.output
    assert len(weight_files(out)) == 3 and sorted(path.name for path in tmp_path.iterdir()) == ["out", "r.json"]
    model = zeroskip.load(encoder)
    zeroskip.prune(model, pattern="2:4", text=text, tokenizer=_tokenizer(encoder))
    assert alike(zeroskip.load(out), model)
    assert json.loads((tmp_path / "r.json").read_text())["sparsity"] == 0.5


def _tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
