"""Replay: the model, taken block by block, is the model."""

import copy

import pytest
import torch
from tiny_models import MODELS, batches, bert, llama, t5, tokens
from torch import nn

from zeroskip.calibrate import Replay, collect, find_blocks, first_tensor, read_batches, sites_of
from zeroskip.calibrate.replay import digest
from zeroskip.errors import ZeroskipError
from zeroskip.model import find_sites


def replay_of(model, given):
    return Replay(model, find_blocks(model), read_batches(model, given))


@pytest.mark.parametrize("kind", MODELS)
def test_unpruned_replay_equals_the_plain_forward_bit_for_bit(kind):
    model = MODELS[kind]()
    given = batches(kind)
    with torch.no_grad():
        plain = [read_batches(model, [one])[0].call(model)[0] for one in given]
    replay = replay_of(model, given)
    assert not replay.keep_all
    for batch, want in zip(replay.batches, plain, strict=True):
        assert torch.equal(replay.logits(batch)[0], want)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "t5", "bert"])
def test_every_block_is_called_with_what_the_plain_forward_gives_it(kind):
    model, given = MODELS[kind](), batches(kind, 2)
    seen: dict[str, list] = {}
    names = {module: name for name, module in model.named_modules()}

    def hook(module, args, kwargs):
        seen.setdefault(names[module], []).append(digest((args, kwargs)))

    replay = replay_of(model, given)
    handles = [block.module.register_forward_pre_hook(hook, with_kwargs=True) for block in replay.order]
    with torch.no_grad():
        for batch in replay.batches:
            batch.call(model)
    plain, seen = seen, {}
    for block in replay.order:
        for index in range(2):
            replay.collect(block, index)
            assert seen[block.name][-1] == plain[block.name][index]
        replay.advance(block)
    for handle in handles:
        handle.remove()
    assert len({one for each in plain.values() for one in each}) == 2 * len(replay.order)


def test_t5_has_two_lists_in_execution_order():
    names = [block.name for block in replay_of(t5(), batches("t5", 1)).order]
    assert names == [f"encoder.block.{i}" for i in range(2)] + [f"decoder.block.{i}" for i in range(3)]


def test_only_the_newest_hidden_states_are_kept():
    replay = replay_of(llama(), batches("llama", 1))
    for block in replay.order[:2]:
        replay.advance(block)
    first, second = replay.records[0].outputs
    assert first.untyped_storage().nbytes() == 4 and torch.isnan(first).all()
    assert torch.isfinite(second).all()


def test_the_models_own_forward_and_mode_come_back():
    model = bert()
    replay = replay_of(model, batches("bert", 1))
    replay.collect(replay.order[0], 0)
    assert all("forward" not in block.module.__dict__ for block in replay.order)


class Skips(nn.Module):
    """Every block but the first two also gets the output before the last, through glue of its own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def forward(self, x):
        outputs = [self.layers[0](x)]
        for layer in self.layers[1:]:
            outputs.append(layer(outputs[-1] + 0.5 * outputs[max(0, len(outputs) - 2)]))
        return outputs[-1]


def test_skip_connections_across_blocks_are_found_and_served():
    torch.manual_seed(0)
    model = Skips().eval()
    x = torch.randn(4, 8)
    replay = replay_of(model, [x])
    assert replay.keep_all
    assert torch.equal(replay.logits(replay.batches[0]), model(x))


class Shared(nn.Module):
    """Two blocks, called three times each, in turns."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        for _ in range(3):
            for layer in self.layers:
                x = layer(x).tanh()
        return x


def test_blocks_that_are_called_several_times():
    torch.manual_seed(0)
    model, x = Shared().eval(), torch.randn(4, 8)
    replay = replay_of(model, [x])
    calls = []
    model.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    replay.advance(replay.order[0])
    calls.clear()
    replay.collect(replay.order[1], 0)
    assert len(calls) == 3
    assert torch.equal(replay.logits(replay.batches[0]), model(x))


class InPlaceGlue(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x += 1
        return x


def test_glue_that_writes_into_an_output():
    torch.manual_seed(0)
    model, x = InPlaceGlue().eval(), torch.randn(4, 8)
    with torch.no_grad():
        want = model(x)
    assert torch.equal(replay_of(model, [x]).logits(read_batches(model, [x])[0]), want)


def test_a_model_that_keeps_state_between_calls_is_refused():
    class Counts(Skips):
        count = 0

        def forward(self, x):
            self.count += 1
            return super().forward(x + self.count)

    with pytest.raises(ZeroskipError, match="not deterministic"):
        replay_of(Counts().eval(), [torch.ones(2, 8)])


def test_in_a_model_without_lists_each_layer_is_a_block():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    assert [block.name for block in replay_of(model, [torch.ones(2, 8)]).order] == ["0", "2"]
    assert [block.name for block in find_blocks(nn.Linear(8, 8))] == [""]
    nn.utils.parametrizations.weight_norm(model[0])  # keeps what computes the weight in a list of modules
    assert [block.name for block in find_blocks(model)] == ["2"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "empty"),
        (["text"], "batch 0 is a str"),
        (3, "give an iterable"),
        ([{"nonsense_": 1, "attention_mask": torch.ones(1, 3)}], None),
        ([{"inputs_embeds": torch.full((1, 2, 32), torch.nan)}], "inputs_embeds holds NaN"),
        ([tokens()[:0]], "is empty"),
    ],
)
def test_bad_batches_get_one_line(given, message):
    if message is None:
        with pytest.raises(ZeroskipError, match="does not fit"):
            read_batches(nn.Linear(2, 2), given)
    else:
        with pytest.raises(ZeroskipError, match=message):
            read_batches(llama(), given)


def test_half_precision_blocks_are_seen_in_fp32_and_stay_as_they_are():
    """The first block of a bf16 model gets the statistics of its fp32 twin; no number moves, not even in memory."""
    model, given = llama(torch.bfloat16), batches("llama", 2)
    places = {name: (value.dtype, value.data_ptr()) for name, value in model.state_dict().items()}
    seen = {}
    for each in (model, copy.deepcopy(model).float()):
        replay = replay_of(each, given)
        sites = sites_of(replay.order[0], find_sites(each))
        seen[each] = collect(replay, replay.order[0], sites, {site.name: ("gram",) for site in sites})
        replay.advance(replay.order[0])
        args, kwargs = replay.call_of(replay.order[1], 0)
        assert first_tensor((args, kwargs)).dtype == each.dtype
    half, full = seen.values()
    for name, (count, stats) in full.items():
        assert half[name][0] == count
        change = (half[name][1]["gram"] - stats["gram"]).norm() / stats["gram"].norm()
        assert change == 0 if "q_proj" in name else change < 1e-3  # the angles of positions are glue, and in bf16
    assert places == {name: (value.dtype, value.data_ptr()) for name, value in model.state_dict().items()}


class Insists(nn.Module):
    """Names the type that it is stored in."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8, dtype=torch.bfloat16)

    def forward(self, x):
        return self.fc(x.to(torch.bfloat16))


def test_a_model_that_insists_on_its_type_runs_in_it():
    model = nn.Sequential(Insists(), Insists())
    given = [torch.randn(4, 8)]
    replay = replay_of(model, given)
    assert not replay.wide.on
    assert torch.equal(replay.logits(replay.batches[0]), model(given[0]))
