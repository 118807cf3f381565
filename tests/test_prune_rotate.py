"""Turning attention values: the function stays, what pruning loses falls, whatever the heads share."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import MODELS, batches, bert, llama
from torch import Tensor, nn

import zeroskip as zs
from zeroskip.calibrate import Replay, find_blocks, read_batches, sites_of
from zeroskip.model import find_sites
from zeroskip.prune.patterns import Pattern
from zeroskip.prune.rotate import rotate

EXPECTED = {"llama": 3, "gemma3": 4, "t5": 8, "bert": 3, "gpt2": 0}  # one V and O an attention; GPT-2 fuses q, k and v


def spread(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and biases that are neither tiny nor zero."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw).to(parameter.dtype))
    return model


def rotated(model: nn.Module, kind: str, pattern: str = "2:4@16") -> dict[str, list[str]]:
    sites = find_sites(model)
    replay = Replay(model, find_blocks(model), read_batches(model, batches(kind)))
    notes: dict[str, list[str]] = {}
    for block in replay.order:
        inside = sites_of(block, sites)
        notes |= rotate(replay, block, inside, {site.name: Pattern.parse(pattern) for site in inside})
        replay.advance(block)
    return notes


def outputs(model: nn.Module, kind: str) -> list[Tensor]:
    with torch.no_grad():
        return [model(**batch)[0] for batch in batches(kind)]


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_the_model_computes_what_it_did(kind: str) -> None:
    model = spread(MODELS[kind]())
    want = outputs(model, kind)
    before = copy.deepcopy(model.state_dict())
    notes = rotated(model, kind)
    assert len(notes) == EXPECTED[kind]
    assert all("values rotated" in note for each in notes.values() for note in each)
    for got, old in zip(outputs(model, kind), want, strict=True):
        torch.testing.assert_close(got, old, rtol=1e-4, atol=1e-4 * float(old.abs().max()))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert len({name.rpartition(".")[0] for name in moved}) == 2 * EXPECTED[kind]


def test_inputs_of_the_output_layer_are_dealt_out_by_energy() -> None:
    model = spread(bert())
    rotated(model, "bert", "2:4@16")
    seen: list[Tensor] = []
    layer = model.encoder.layer[0].attention.output.dense
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    outputs(model, "bert")
    mask = torch.cat([batch["attention_mask"].bool() for batch in batches("bert")])
    energy = torch.cat(seen)[mask].square().mean(0).view(4, 2, 4)  # heads of eight inputs in two groups of four
    falling = energy.transpose(1, 2).flatten(1)
    assert bool((falling.diff(dim=1) <= 1e-3 * falling[:, :1]).all())
    columns = layer.weight.detach().norm(dim=0)
    torch.testing.assert_close(columns, torch.ones_like(columns), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_pruning_loses_less(kind: str) -> None:
    name = {"bert": "attention.output.dense", "llama": "o_proj"}[kind]
    lost = {}
    for turn in (False, True):
        model = spread(MODELS[kind]())
        report = zs.prune(model, "wanda+ls", pattern="8:16@16", calibration=batches(kind), rotate=turn)
        lost[turn] = sum(row.error or 0 for row in report.rows if row.name.endswith(name))
        assert any("values rotated" in note for row in report.rows for note in row.notes) == turn
        assert report.recipe["rotate"] is turn
        assert all(row.sparsity == 0.5 for row in report.rows)
    assert lost[True] < 0.9 * lost[False]


def test_weights_keep_their_types_and_excluded_layers_their_values() -> None:
    model = spread(llama(torch.bfloat16))
    kept = model.model.layers[1].self_attn.o_proj.weight.clone()
    report = zs.prune(model, "wanda", pattern="2:4", calibration=batches("llama"), rotate=True, exclude="*1.*o_proj")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.layers[1].self_attn.o_proj.weight, kept)
    turned = [row.name for row in report.rows if any("rotated" in note for note in row.notes)]
    assert turned == [f"model.layers.{index}.self_attn.v_proj" for index in (0, 2)]


def test_a_model_without_heads_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    report = zs.prune(model, "wanda", pattern="2:4", calibration=[torch.randn(8, 16)], rotate=True)
    assert report.rows[0].notes == ["nothing to rotate in this block: no values were found"]


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [("wanda", "yes", "rotate is 'yes': give true or false"), ("magnitude", True, "rotate needs a method that uses")],
)
def test_refusals(method: str, value: object, message: str) -> None:
    with pytest.raises(zs.ZeroskipError, match=message):
        zs.prune(llama(), method, pattern="2:4", calibration=batches("llama"), rotate=value)  # type: ignore[arg-type]
