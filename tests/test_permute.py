"""Permutation: what may change places is found and keeps the function; what a view promises holds; the search gains."""

import copy

import pytest
import torch
from cli_models import cli, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import MODELS, batches, llama, tokens
from torch import nn

from zeroskip.calibrate import Block, Replay, find_blocks
from zeroskip.calibrate.data import read_batches
from zeroskip.errors import ZeroskipError
from zeroskip.permute import Permuter, Probe, find_exchanges, search
from zeroskip.permute.block import permute_stats
from zeroskip.permute.views import views_of
from zeroskip.prune import Pattern, prune
from zeroskip.prune.settings import Settings

FOUND = {
    "llama": {"v_proj": "o_proj", "gate_proj up_proj": "down_proj"},
    "gemma3": {"v_proj": "o_proj", "gate_proj up_proj": "down_proj"},
    "bert": {"value": "dense", "dense": "dense"},
    "gpt2": {"c_attn": "c_proj", "c_fc": "c_proj"},
    "t5": {"v": "o", "wi": "wo"},
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def asked(pattern, sparsity=None):
    values = {"method": "wanda", "pattern": pattern, "sparsity": sparsity, "values": None, "group_size": None}
    return Settings.read(values)


def last(name):
    return name.rpartition(".")[2]


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_found_may_change_places(kind):
    model = MODELS[kind]()
    given = read_batches(model, batches(kind))
    replay, permuter, found = Replay(model, find_blocks(model), given), Permuter(), {}
    before = given[1].call(model)[0].detach()
    old = copy.deepcopy(model.state_dict())
    for block in replay.order:
        args, kwargs = replay.call_of(block, 0)
        permuter.look(block, args, kwargs, seeded())
        each = {f"{block.name}.{site.name}": site for site in Probe(block.module, args, kwargs).sites.values()}
        seen = {name: (1, {"sumsq": torch.rand(1, site.shape[2], generator=seeded())}) for name, site in each.items()}
        _, told = permuter.permute(block, args, kwargs, dict.fromkeys(each, asked("2:4@8")), seen, seeded())
        for name, about in told.items():
            found.setdefault(last(name), set()).update(map(last, about["with"]))
            assert about["kept"] > about["kept_before"]
        replay.advance(block)
    for producers, consumer in FOUND[kind].items():
        for producer in producers.split():
            assert consumer in found[producer] and producer in found[consumer]
    assert not {"q_proj", "k_proj", "query", "key", "q", "k"} & set(found)
    assert any(not torch.equal(value, old[name]) for name, value in model.state_dict().items())
    after = given[1].call(model)[0].detach()
    assert float((after - before).abs().max()) <= 1e-5 * float(before.abs().max())


class Between(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self, middle, skip=False):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.middle, self.down, self.skip = nn.Linear(16, 32), middle, nn.Linear(32, 16), skip

    def forward(self, x):
        hidden = self.up(x)
        return self.down(self.middle(hidden)) + (hidden[..., :16] if self.skip else 0)


def slopes():
    middle = nn.PReLU(32)
    middle.weight.data = torch.linspace(0.1, 0.9, 32)
    return middle


@pytest.mark.parametrize(
    ("middle", "skip", "there"),
    [
        (nn.GELU(), False, True),
        (nn.Identity(), False, True),
        (nn.Softmax(-1), False, False),
        (nn.LayerNorm(32), False, False),
        (slopes(), False, False),
        (nn.GELU(), True, False),  # the hidden channels are also used as they stand
    ],
)
def test_channels_stay_where_each_is_treated_in_its_own_way(middle, skip, there):
    module = Between(middle, skip).eval()
    if isinstance(middle, nn.PReLU):
        module.middle.forward = lambda x: torch.where(x > 0, x, x * module.middle.weight)
    x = torch.randn(1, 40, 16, generator=seeded())
    permuter, block = Permuter(), Block("b", module, "b")
    permuter.look(block, (x,), {}, seeded())
    assert bool(next(iter(permuter.known.values()))) == there
    seen = {"b.down": (1, {"sumsq": torch.rand(1, 32, generator=seeded())})}
    before, old = module(x), module.up.weight.clone()
    _, told = permuter.permute(block, (x,), {}, {"b.down": asked("2:4")}, seen, seeded())
    assert (set(told) == {"b.up", "b.down"}) == there and torch.equal(module.up.weight, old) != there
    torch.testing.assert_close(module(x), before, rtol=0, atol=1e-5)


def test_two_consumers_move_together_and_heads_stay_whole():
    class Fork(Between):
        def __init__(self):
            super().__init__(nn.ReLU())
            self.other = nn.Linear(32, 16)

        def forward(self, x):
            hidden = self.up(x).relu()
            return self.down(hidden) - self.other(hidden)

    (exchange,) = find_exchanges(Probe(Fork(), (torch.randn(1, 99, 16, generator=seeded()),), {}), seeded())
    assert [ends.site for ends in exchange.rows] == ["up"] and {e.site for e in exchange.columns} == {"down", "other"}
    model = llama()
    replay = Replay(model, find_blocks(model), read_batches(model, [tokens()]))
    probe = Probe(replay.order[0].module, *replay.call_of(replay.order[0], 0))
    found = {exchange.rows[0].site: exchange for exchange in find_exchanges(probe, seeded())}
    heads = found["self_attn.v_proj"]  # 2 heads of keys and values, 4 of queries, 8 channels each
    assert heads.columns[0].at.shape == (16, 2)
    for row, columns, kind in zip(heads.rows[0].at, heads.columns[0].at, heads.classes, strict=True):
        assert columns.tolist() == [int(row) // 8 * 16 + int(row) % 8 + extra for extra in (0, 8)]
        assert int(kind) == int(heads.classes[int(row) // 8 * 8])


def test_shared_weights_and_layers_called_twice_stay():
    class Twice(Between):
        def forward(self, x):
            return self.down(self.up(x)) + self.down(self.up(x + 1))

    x = torch.randn(1, 40, 16, generator=seeded())
    assert not Probe(Twice(nn.Identity()), (x,), {}).sites
    module = Between(nn.ReLU())
    module.again = nn.Linear(16, 32)
    module.again.weight = module.up.weight
    assert set(Probe(module, (x,), {}).sites) == {"down"}


def kept(saliency, pattern, sparsity):
    """The oracle: what the pattern itself would keep."""
    keep = pattern.select(saliency, sparsity)
    return float(saliency.double()[keep].sum() / saliency.double().sum())


PATTERNS = [("2:4", 0.5), ("1:4@8", 0.75), ("4:8@6", 0.5), ("block:4x1", 0.5), ("block:1x4", 0.25), ("block:4x8", 0.7)]


@pytest.mark.parametrize(("name", "sparsity"), PATTERNS)
def test_views_promise_what_the_pattern_keeps(name, sparsity):
    saliency = torch.rand(20, 24, generator=seeded()).pow(4)
    pattern = Pattern.parse(name)
    rows, columns = torch.randperm(20, generator=seeded()), torch.randperm(24, generator=seeded()).view(12, 2)
    for view in views_of(saliency, pattern, sparsity, rows, columns):
        assert view.kept() == pytest.approx(kept(saliency, pattern, sparsity), rel=1e-5)
        slots = torch.arange(0, len(view.where), 3)
        matrix = view.replaced(slots)
        for i in range(len(slots)):
            for j in range(len(slots)):
                one, other = slots[i : i + 1], slots[j : j + 1]
                if view.cells[one] == view.cells[other]:
                    continue
                limited = name.startswith("block")  # there the cut stands still, so the promise is about that cut
                changed = copy.deepcopy(view)
                before = changed._stays(changed.sums).sum() * changed.scale if limited else changed.kept()
                changed.swap(one, other)
                after = changed._stays(changed.sums).sum() * changed.scale if limited else changed.kept()
                gain = matrix[i, j] + matrix[j, i] - matrix[i, i] - matrix[j, j]
                if view.exact:
                    assert float(gain) == pytest.approx(float(after - before), abs=1e-6)
                else:
                    assert float(gain) >= float(after - before) - 1e-6
                    assert float(view.exchanged(one, other)) == pytest.approx(float(after - before), abs=1e-6)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(PATTERNS), st.integers(0, 99), st.integers(1, 3))
def test_the_search_never_loses_and_stays_within_classes(pattern, seed, classes):
    parsed = Pattern.parse(pattern[0])
    one, two = (torch.rand(24, 24, generator=seeded(seed + more)).pow(3) for more in (0, 100))
    slots = torch.arange(24)
    kinds = torch.randint(classes, (24,), generator=seeded(seed))
    views = views_of(one, parsed, pattern[1], None, slots[:, None]) + views_of(two, parsed, pattern[1], slots, None)
    if not views:
        return
    promised = sum(view.kept() for view in views)
    order = search(views, kinds, seeded(seed))
    assert order.sort().values.equal(slots) and kinds[order].equal(kinds)
    found = [(one[:, order], views_of(one, parsed, pattern[1], None, slots[:, None]))]
    found += [(two[order], views_of(two, parsed, pattern[1], slots, None))]
    now = sum(kept(matrix, parsed, pattern[1]) for matrix, theirs in found if theirs)
    assert now == pytest.approx(sum(view.kept() for view in views), rel=1e-5)
    if not pattern[0].startswith("block"):
        assert now >= promised - 1e-6


def test_the_search_finds_what_was_planted():
    # Large columns stand side by side: 2:4 must drop half of them, unless they are spread.
    saliency = torch.full((16, 64), 0.01)
    saliency[:, :32] = 1.0
    (view,) = views_of(saliency, Pattern.parse("2:4"), 0.5, None, torch.arange(64)[:, None])
    assert view.kept() < 0.52
    search([view], torch.zeros(64, dtype=torch.int64), seeded())
    assert view.kept() == pytest.approx(32 / 32.32, rel=1e-5)
    # Rows of two kinds take turns: strips of 8 want them apart.
    saliency = torch.full((32, 16), 0.01)
    saliency[::2, ::2], saliency[1::2, 1::2] = 1.0, 1.0
    (view,) = views_of(saliency, Pattern.parse("2:4@8"), 0.5, torch.arange(32), None)
    before = view.kept()
    search([view], torch.zeros(32, dtype=torch.int64), seeded())
    assert before < 0.51 and view.kept() > 0.9


def test_statistics_move_with_the_columns():
    x = torch.randn(30, 6, generator=seeded())
    index = torch.tensor([3, 0, 1, 5, 2, 4])
    stats = {"gram": (x.t() @ x)[None], "sumsq": x.square().sum(0)[None], "tokens": torch.tensor([30])}
    new, moved = permute_stats(stats, index), x[:, index]
    torch.testing.assert_close(new["gram"][0], moved.t() @ moved)
    torch.testing.assert_close(new["sumsq"][0], moved.square().sum(0))
    assert new["tokens"] is stats["tokens"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prune_permutes_first(dtype):
    plain, model = llama(dtype), llama(dtype)
    given = [tokens(seed=seed) for seed in range(3)]
    without = prune(plain, "wanda+ls", pattern="2:4", calibration=given)
    report = prune(model, "wanda+ls", pattern="2:4", calibration=given, permute=True)
    assert report.recipe["permute"] is True and without.recipe["permute"] is False
    told = {row.name: row.permuted for row in report.rows}
    assert all((told[name] is None) == name.endswith(("q_proj", "k_proj")) for name in told)
    assert all(row.permuted is None for row in without.rows) and "permuted with" in str(report)
    errors = [sum(row.error for row in each.rows if row.name.endswith("down_proj")) for each in (report, without)]
    assert errors[0] < errors[1]
    weight = model.model.layers[0].mlp.down_proj.weight
    assert ((weight.view(32, -1, 4) != 0).sum(2) <= 2).all() and {row.sparsity for row in report.rows} == {0.5}
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {dtype}


def test_a_resumed_run_has_the_same_bits(tmp_path):
    whole, model = llama(), llama()
    asking = {"pattern": "2:4@8", "calibration": [tokens()], "permute": True}
    first = prune(whole, "wanda+ls", **asking, journal=tmp_path / "j")
    for late in sorted((tmp_path / "j").glob("*.safetensors"))[1:]:
        late.unlink()
    again = prune(model, "wanda+ls", **asking, journal=tmp_path / "j")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
    assert [row.name for row in first.rows if row.permuted] == [row.name for row in again.rows if row.permuted]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparsity": 0.5}, "without such a pattern it gains nothing"),
        ({"pattern": "2:4", "method": "synflow"}, "leave one out"),
        ({"pattern": "2:4", "permute": "yes"}, "give true or false"),
        ({"pattern": "2:4", "method": "magnitude", "calibration": None}, "permute needs a method that uses"),
    ],
)
def test_bad_input_gets_one_line(given, message):
    with pytest.raises(ZeroskipError, match=message):
        prune(llama(), **{"method": "wanda", "permute": True, "calibration": [tokens()]} | given)


def test_the_command_line_permutes(decoder, text, tmp_path):
    asking = ("--pattern", "2:4", "--permute", "--no-speed", "--no-quality")
    result = cli("prune", decoder, tmp_path / "out", *asking, "--text", text)
    assert result.exit_code == 0, result.output
    assert "permuted with" in result.stdout and "permuted with" in (tmp_path / "out" / "report.html").read_text()
    assert "permute needs a method" in refused("prune", decoder, tmp_path / "no", "--method", "magnitude", *asking)
