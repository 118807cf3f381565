"""Statistics: padding counts in none, shared inputs are counted once, halves merge to the whole."""

import pytest
import torch
from tiny_models import MODELS, batches, bert, llama, t5
from torch import nn

from zeroskip.calibrate import Block, Collector, Replay, Stat, collect, find_blocks, read_batches, sites_of
from zeroskip.errors import ZeroskipError
from zeroskip.model import find_sites

NEEDS = ("sumsq", "gram")


def all_stats(model, given, share=True):
    """Statistics of every site of the unpruned model, through the replay."""
    sites = find_sites(model)
    replay = Replay(model, find_blocks(model), read_batches(model, given))
    found = {}
    for block in replay.order:
        inside = sites_of(block, sites)
        found |= collect(replay, block, inside, {site.name: NEEDS for site in inside}, share)
        replay.advance(block)
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_statistics_equal_those_of_the_tokens_that_are_no_padding(kind):
    """Against hooks of our own on the plain forward, tokens picked by hand."""
    model, given = MODELS[kind](), batches(kind, 2)
    found = all_stats(model, given)
    inputs: dict[str, list[torch.Tensor]] = {}
    now = {}
    cross = ("EncDecAttention.k", "EncDecAttention.v")

    def hook(name):
        def run(module, args):
            on_decoder = name.startswith("decoder") and not name.endswith(cross)
            mask = now["decoder_attention_mask" if on_decoder else "attention_mask"]
            inputs.setdefault(name, []).append(args[0][mask != 0])

        return run

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in found]
    with torch.no_grad():
        for batch in read_batches(model, given):
            now = batch.kwargs
            batch.call(model)
    for handle in handles:
        handle.remove()
    for name, (count, stats) in found.items():
        x = torch.cat(inputs[name]).double()
        assert count == len(x)
        assert torch.allclose(stats["sumsq"][0].double(), x.square().sum(0), rtol=1e-5)
        assert torch.allclose(stats["gram"][0].double(), x.t() @ x, rtol=1e-4, atol=1e-4)


def test_equal_lengths_of_encoder_and_decoder_do_not_confuse_the_masks():
    model, given = t5(), batches("t5", 1)
    given[0]["decoder_input_ids"] = given[0]["input_ids"].flip(1)
    given[0]["decoder_attention_mask"] = torch.ones(4, 12, dtype=torch.long)
    found = all_stats(model, given)
    assert found["decoder.block.0.layer.0.SelfAttention.k"][0] == 48
    assert found["decoder.block.0.layer.1.EncDecAttention.q"][0] == 48
    assert found["decoder.block.0.layer.1.EncDecAttention.k"][0] == int(given[0]["attention_mask"].sum())


def test_padding_content_changes_no_statistic():
    given = batches("bert", 1)
    before = all_stats(bert(), given)
    given[0]["input_ids"] = given[0]["input_ids"] + 5 * (given[0]["attention_mask"] == 0)
    after = all_stats(bert(), given)
    for name, (_, stats) in before.items():
        assert torch.allclose(stats["gram"], after[name][1]["gram"], rtol=1e-4, atol=1e-4)


def test_queries_keys_and_values_share_one_gram_matrix():
    model = llama()
    found = all_stats(model, batches("llama"))
    q, k, o = (found[f"model.layers.1.self_attn.{p}_proj"][1]["gram"] for p in "qko")
    assert q is k and q is not o
    apart = all_stats(model, batches("llama"), share=False)
    assert all(torch.equal(stats["gram"], apart[name][1]["gram"]) for name, (_, stats) in found.items())


class Fickle(nn.Module):
    """Two sites share their input in every other batch only."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x) + self.b(x if x.shape[0] % 2 else x + 1)


def test_inputs_that_are_shared_only_sometimes():
    model = Fickle().eval()
    given = [torch.randn(3, 4), torch.randn(2, 4), torch.randn(5, 4)]
    sites = find_sites(model)
    replay = Replay(model, [Block("", model, "")], read_batches(model, given))
    found = collect(replay, replay.order[0], sites, {site.name: NEEDS for site in sites})
    x = torch.cat([given[0], given[1] + 1, given[2]])
    assert torch.allclose(found["b"][1]["gram"][0], x.t() @ x, atol=1e-5)
    assert found["a"][0] == found["b"][0] == 10


@pytest.mark.parametrize("name", sorted(Stat.known))
def test_two_halves_merged_equal_the_whole(name):
    x = torch.randn(1, 64, 12, generator=torch.Generator().manual_seed(0))
    whole, one, two = (Stat.known[name]() for _ in range(3))
    whole.update(x)
    one.update(x[:, :20])
    two.update(x[:, 20:])
    one.merge(two)
    one.merge(Stat.known[name]())
    assert torch.allclose(one.total, whole.total, rtol=1e-5, atol=1e-5)


def test_nan_in_an_activation_names_the_site():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].bias[0] = torch.nan
    collector = Collector(find_sites(model), NEEDS, lambda x: None)
    with pytest.raises(ZeroskipError, match="1: its calibration input holds NaN"):
        model(torch.ones(2, 4))
    collector.close()
    assert not model[0]._forward_pre_hooks
