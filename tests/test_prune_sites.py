"""Pruning every kind of site: exact counts, errors as fp64 has them, solvers that help, resume to the same bits."""

import pytest
import torch
from site_models import KINDS, MIXTURES, Called, conv, correlated, make, mixtral
from tiny_models import batches
from torch import nn

from zeroskip.calibrate import Replay, find_blocks, read_batches
from zeroskip.errors import ZeroskipError
from zeroskip.model import every_site, find_sites
from zeroskip.prune import Pattern, prune


def errors(dense: nn.Module, pruned: nn.Module, given: list) -> dict[str, float]:
    """{site: ||(W - V) X||^2 / ||W X||^2} in fp64, X being what flows into the sites of the dense model."""
    lost = {site.name: [0.0, 0.0] for site in every_site(dense)}
    new = {site.name: site for site in every_site(pruned)}

    def hook(site):
        def run(module, args, kwargs):
            weights = zip(site.inputs(*args, **kwargs), site.weight(), new[site.name].weight(), strict=True)
            for x, w, v in weights:
                lost[site.name][0] += float(((w - v).double() @ x.double().t()).square().sum())
                lost[site.name][1] += float((w.double() @ x.double().t()).square().sum())

        return run

    handles = [s.module.register_forward_pre_hook(hook(s), with_kwargs=True) for s in every_site(dense)]
    with torch.no_grad():
        for batch in given:
            dense(*batch)
    for handle in handles:
        handle.remove()
    return {name: part / whole for name, (part, whole) in lost.items()}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "encoder"])
def test_counts_are_exact_and_errors_are_those_of_fp64(kind):
    dense, given = make(kind)
    for method in ("wanda+ls", "sparsegpt", "admm"):
        model, _ = make(kind)
        report = prune(model, method, sparsity=0.47, calibration=given)
        found = errors(dense, model, given)
        assert [row.name for row in report.rows] == [site.name for site in find_sites(model)]
        for row, site in zip(report.rows, find_sites(model), strict=True):
            weight = site.weight()
            assert int((weight == 0).sum()) == round(weight.numel() * 0.47)
            assert row.error == pytest.approx(found[row.name], rel=2e-3)
            if method == "wanda+ls":
                assert row.error < row.error_before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", None), ("1:4@8", None), ("block:1x2", 0.5)])
def test_patterns_hold_in_every_matrix(kind, pattern, sparsity):
    model, given = make(kind)
    fits = {site.name for site in find_sites(model) if _holds(pattern, site)}
    report = prune(model, "wanda+ls", pattern=pattern, sparsity=sparsity, calibration=given, include=sorted(fits))
    parsed = Pattern.parse(pattern)
    for row, site in zip(report.rows, [s for s in find_sites(model) if s.name in fits], strict=True):
        asked = parsed.sparsity or sparsity
        for matrix in site.weight():
            kept = (matrix != 0).float()
            assert torch.equal(parsed.select(kept, asked), kept != 0)
        assert row.sparsity == pytest.approx(asked, abs=0.5 / site.weight().numel() + 1e-9)


def _holds(pattern, site) -> bool:
    try:
        Pattern.parse(pattern).check(site.grid, site.name)
    except ZeroskipError:
        return False
    return True


def test_channels_that_a_pattern_cannot_hold():
    model, given = conv(nn.Conv2d, (4, 6, 9, 9), 6, 8, 2)()
    with pytest.raises(ZeroskipError, match="layer: 6 inputs are not a multiple of 4, which 2:4 needs"):
        prune(model, "wanda", pattern="2:4", calibration=given)


def test_a_depthwise_convolution_counts_over_all_of_its_channels():
    model, given = conv(nn.Conv2d, (4, 5, 9, 9), 5, 10, 3, groups=5)()
    report = prune(model, "wanda+ls", sparsity=0.5, calibration=given, include="layer")
    (site,) = every_site(model)
    zeros = (site.weight() == 0).sum((1, 2))
    assert int(zeros.sum()) == 45 and set(zeros.tolist()) == {9} and report.rows[0].error < report.rows[0].error_before
    odd, given = conv(nn.Conv2d, (4, 5, 9, 9), 5, 5, 3, groups=5)()
    prune(odd, "magnitude", sparsity=0.5, include="layer")
    zeros = (every_site(odd)[0].weight() == 0).sum((1, 2))
    assert int(zeros.sum()) == 22 and set(zeros.tolist()) == {4, 5}


def test_rounded_convolutions_keep_their_scales():
    model, given = make("conv2d groups")
    prune(model, "magnitude", sparsity=0.5)
    zeros = every_site(model)[0].weight() == 0
    prune(model, "gptq", values="int8", group_size=32, calibration=given)
    (site,) = every_site(model)
    assert site.scales.shape == (3, 3, 2) and (site.weight()[zeros] == 0).all()
    codes = site.weight() / site.scales.float().repeat_interleave(32, 2)[..., :36]
    assert torch.allclose(codes, codes.round(), atol=1e-3)


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
@pytest.mark.parametrize("kind", ["conv2d groups", "lstm", "attention", "encoder"])
def test_methods_of_gradients_serve_every_kind(kind, method):
    model, given = make(kind)

    def loss(output, batch):
        return (output if isinstance(output, torch.Tensor) else output[0]).square().mean()

    more = {} if method == "synflow" else {"loss": loss}
    prune(model, method, sparsity=0.5, calibration=given, **more)
    for site in find_sites(model):
        assert int((site.weight() == 0).sum()) == round(site.weight().numel() * 0.5)


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["lstm", "attention apart", "encoder"])
def test_resume_gives_the_same_bits(tmp_path, kind):
    whole, given = make(kind)
    again, _ = make(kind)
    prune(whole, "wanda+ls", sparsity=0.5, calibration=given, journal=tmp_path / "j")
    last = max((tmp_path / "j").glob("*.safetensors"))
    last.unlink()
    prune(again, "wanda+ls", sparsity=0.5, calibration=given, journal=tmp_path / "j")
    assert all(torch.equal(value, bits(again)[name]) for name, value in bits(whole).items())


@pytest.mark.parametrize("kind", MIXTURES)
def test_mixtures_prune_each_expert_on_its_own_tokens(kind):
    model = MIXTURES[kind]()
    report = prune(model, "wanda+ls", sparsity=0.5, calibration=batches("llama", 3))
    rows = {row.name: row for row in report.rows}
    for name in ("gate_up_proj", "down_proj"):
        row = rows[f"model.layers.1.{'feed_forward' if kind == 'llama4' else 'mlp'}.experts.{name}"]
        assert row.sparsity == 0.5 and row.error < row.error_before
    model(**batches("llama", 1)[0])


def test_an_expert_that_no_token_reaches_is_pruned_by_size():
    model = mixtral(num_experts_per_tok=1)
    layer = model.model.layers[0].mlp
    with torch.no_grad():
        layer.gate.weight[2] = 0
        layer.gate.weight[2, 0] = -1e4
        model.model.layers[0].post_attention_layernorm.weight[0] = 1e3
    before = layer.experts.gate_up_proj[2].clone()
    hits = []
    layer.experts.register_forward_pre_hook(lambda _, args: hits.append(args[1].unique().tolist()))
    given = batches("llama", 1)
    model(**given[0])
    idle = sorted(set(range(4)) - set(hits[0]))
    assert idle
    layer.experts._forward_pre_hooks.clear()
    report = prune(model, "wanda+ls", sparsity=0.5, calibration=given)
    row = next(row for row in report.rows if row.name == "model.layers.0.mlp.experts.gate_up_proj")
    assert f"no calibration token reached matrices {', '.join(map(str, idle))} of 4" in row.notes[0]
    assert row.sparsity == 0.5
    after = layer.experts.gate_up_proj[idle[0]]
    if idle[0] == 2:
        assert torch.equal(after[after != 0], before[after != 0])
    for one in after:
        assert int((one == 0).sum()) == 16


class Net(nn.Module):
    """A small residual network with stages."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.stage = nn.Sequential(*(Residual(8) for _ in range(3)))
        self.head = nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()), nn.Flatten(), nn.Linear(8 * 36, 4))

    def forward(self, x):
        return self.head(self.stage(self.norm(self.stem(x)).relu()))


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x):
        return (x + self.body(x)).relu()


def net():
    torch.manual_seed(0)
    return Net().eval(), [(correlated((5, 3, 6, 6), seed),) for seed in range(3)]


def test_a_model_without_lists_falls_into_the_items_of_its_sequences():
    model, given = net()
    names = ["stem", "stage.0", "stage.1", "stage.2", "head.0.0", "head.2"]
    assert [block.name for block in find_blocks(model)] == names
    replay = Replay(model, find_blocks(model), read_batches(model, given))
    assert [block.name for block in replay.order] == names and not replay.keep_all
    with torch.no_grad():
        assert torch.equal(replay.logits(replay.batches[1]), model(*given[1]))


def test_a_convolutional_model_is_pruned_with_its_default_settings(tmp_path):
    (model, given), (again, _) = net(), net()
    report = prune(model, sparsity=0.5, calibration=given, journal=tmp_path / "j")
    assert len(report.rows) == 9 and not report.skipped
    assert all(row.sparsity == pytest.approx(0.5, abs=0.01) and row.error < row.error_before for row in report.rows)
    assert len(list((tmp_path / "j").glob("*.safetensors"))) == 6
    for index in (3, 4, 5):
        (tmp_path / "j" / f"{index:05d}.safetensors").unlink()
    prune(again, sparsity=0.5, calibration=given, journal=tmp_path / "j")
    assert all(torch.equal(value, bits(again)[name]) for name, value in bits(model).items())


def test_later_blocks_are_pruned_on_what_the_pruned_ones_give():
    """The last layer's statistics are those of the pruned model, not of the dense one."""
    model, given = net()
    report = prune(model, "wanda+ls", sparsity=0.7, calibration=given)
    row = report.rows[-1]
    x = []
    model.head[2].register_forward_pre_hook(lambda _, args: x.append(args[0]))
    dense, _ = net()
    with torch.no_grad():
        for batch in given:
            model(*batch)
    x = torch.cat(x).double()
    old, new = dense.head[2].weight.double(), model.head[2].weight.double()
    error = float(((old - new) @ x.T).square().sum() / (old @ x.T).square().sum())
    assert row.error == pytest.approx(error, rel=2e-3)


def test_an_embedding_is_pruned_where_it_is_named():
    table = nn.Embedding(50, 16)
    model = nn.Sequential(table, nn.Linear(16, 16)).eval()
    given = [(torch.randint(0, 20, (4, 7)),)]
    with pytest.raises(
        ZeroskipError, match="0: method 'wanda\\+ls' needs inputs that correlate, which those of an Emb"
    ):
        prune(model, "wanda+ls", sparsity=0.5, calibration=given, include="0")
    report = prune(model, "wanda", sparsity=0.5, calibration=given, include="0")
    assert report.rows[0].tokens == 28 and ((table.weight == 0).sum(1) == 8).all()
    other = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16))
    prune(other, "magnitude", sparsity=0.25, include="0")
    assert int((other[0].weight == 0).sum()) == 200


def test_tuning_moves_a_convolution_but_no_zero():
    model, given = net()
    report = prune(model, "wanda+ls+tune", sparsity=0.5, calibration=given, include="stage.1.*")
    assert "tuning took its error" in report.rows[0].notes[-1]
    for site in find_sites(model, include="stage.1.*"):
        assert int((site.weight() == 0).sum()) == round(site.weight().numel() * 0.5)


def test_a_layer_alone_is_a_model():
    layer = nn.LSTM(12, 8)
    report = prune(layer, sparsity=0.5, calibration=[correlated((9, 4, 12), 0)])
    assert [row.name for row in report.rows] == ["weight_ih_l0", "weight_hh_l0"]
    assert Called(layer).layer is layer
