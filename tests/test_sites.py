"""Every kind of site: what its matrices multiply gives the layer's output, and writing gives the weight back."""

import pytest
import torch
from site_models import KINDS, MIXTURES, Called, correlated, make
from tiny_models import batches, llama, tokens
from torch import nn

from zeroskip.calibrate import Collector
from zeroskip.errors import ZeroskipError
from zeroskip.model import every_site, find_sites, select_sites
from zeroskip.prune import Pattern
from zeroskip.sites import Call, ExpertsAdapter


def products(model: nn.Module, batch: tuple) -> dict[str, list[torch.Tensor]]:
    """{site: what its matrices give for one batch, each [tokens, out]} in fp64."""
    found = {}

    def hook(site):
        def run(module, args, kwargs):
            pairs = zip(site.inputs(*args, **kwargs), site.weight(), strict=True)
            found[site.name] = [x.double() @ weight.double().t() for x, weight in pairs]

        return run

    handles = [s.module.register_forward_pre_hook(hook(s), with_kwargs=True) for s in every_site(model)]
    with torch.no_grad():
        model(*batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("conv")])
def test_a_convolution_is_its_matrix_times_the_patches(kind):
    model, given = make(kind)
    conv = model.layer
    (product,) = products(model, given[0]).values()
    with torch.no_grad():
        want = conv.double()(given[0][0].double()) - conv.bias.view(-1, *[1] * len(conv.kernel_size))
    want = want.movedim(1, -1).reshape(-1, len(product), product[0].shape[1]).transpose(0, 1)
    assert torch.allclose(torch.stack(product), want, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_writing_what_was_read_changes_nothing(kind):
    model, _ = make(kind)
    for site in every_site(model):
        before = site.tensor.detach().clone()
        site.write(site.weight().clone())
        assert torch.equal(site.tensor, before)
        new = torch.randn(site.shape)
        site.write(new)
        assert torch.equal(site.weight(), new)


def step_by_step(rnn: nn.LSTM, x: torch.Tensor, suffix: str) -> tuple[list, list, list]:
    """An LSTM layer in fp64 by its equations: (hidden before each step, hidden before projection, outputs)."""
    w_ih, w_hh, b_ih, b_hh = (
        getattr(rnn, f"{n}{suffix}").double() for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    project = getattr(rnn, f"weight_hr{suffix}").double() if rnn.proj_size else torch.eye(rnn.hidden_size).double()
    hidden, cell = torch.zeros(len(project)).double(), torch.zeros(rnn.hidden_size).double()
    before, inner, outputs = [], [], []
    for now in x.double():
        before.append(hidden)
        i, f, g, o = (w_ih @ now + b_ih + w_hh @ hidden + b_hh).chunk(4)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        inner.append(o.sigmoid() * cell.tanh())
        hidden = project @ inner[-1]
        outputs.append(hidden)
    return before, inner, outputs


@torch.no_grad()
def test_the_hidden_states_of_ragged_sequences_both_ways():
    """Against the equations, sequence by sequence; the order of the tokens is free."""
    model, given = make("lstm packed")
    rnn = model.layer
    packed = nn.utils.rnn.pack_padded_sequence(*given[0], enforce_sorted=False)
    sites = {site.name.removeprefix("layer."): site for site in every_site(model)}
    want: dict[str, list] = {name: [] for name in sites}
    for x in nn.utils.rnn.unpack_sequence(packed):
        for layer in range(2):
            outputs = []
            for way in ("", "_reverse"):
                turned = x.flip(0) if way else x
                before, inner, out = step_by_step(rnn, turned, f"_l{layer}{way}")
                for part, values in (("ih", turned), ("hh", before), ("hr", inner)):
                    want[f"weight_{part}_l{layer}{way}"] += list(values)
                outputs.append(torch.stack(out).flip(0) if way else torch.stack(out))
            x = torch.cat(outputs, 1)
    for name, site in sites.items():
        found, expected = site.inputs(packed)[0].double(), torch.stack(want[name]).double()
        assert found.shape == expected.shape
        assert torch.allclose(found.T @ found, expected.T @ expected, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gru", "rnn"])
def test_one_step_from_the_collected_states_gives_the_next(kind):
    model, given = make(kind)
    rnn, x = model.layer, given[0][0]
    x = x.transpose(0, 1) if rnn.batch_first else x
    found = {site.name: site for site in every_site(model)}
    last = rnn.num_layers - 1
    inputs = found[f"layer.weight_ih_l{last}"].inputs(given[0][0])[0]
    before = found[f"layer.weight_hh_l{last}"].inputs(given[0][0])[0]
    cell = (nn.GRUCell if kind == "gru" else nn.RNNCell)(inputs.shape[1], 8, bias=rnn.bias)
    if kind == "rnn":
        cell.nonlinearity = "relu"
    for name, _ in list(cell.named_parameters()):
        setattr(cell, name, getattr(rnn, f"{name}_l{last}"))
    want = rnn(given[0][0])[0]
    want = (want.transpose(0, 1) if rnn.batch_first else want).reshape(-1, 8)
    assert torch.allclose(cell(inputs, before), want, atol=1e-5)


@torch.no_grad()
def test_given_states_and_unbatched_sequences():
    rnn, x, first = nn.GRU(6, 5), torch.randn(7, 6), torch.randn(1, 5)
    sites = {site.name: site for site in every_site(Called(rnn))}
    before = sites["layer.weight_hh_l0"].inputs(x, first)[0]
    assert torch.equal(before[0], first[0]) and torch.allclose(before[1:], rnn(x, first)[0][:-1])
    assert torch.equal(sites["layer.weight_ih_l0"].inputs(x, first)[0], x)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["attention", "attention apart"])
def test_attention_shows_the_input_of_its_output_projection(kind):
    model, given = make(kind)
    layer = model.layer
    for batch in (given[0], (given[0][0][..., :16],) * 3 if kind == "attention" else given[1]):
        got = products(model, batch)["layer.out_proj"][0] + layer.out_proj.bias
        assert torch.allclose(got.float(), model(*batch)[0].reshape(-1, 16), atol=1e-5)
    found = [x for site in every_site(model)[:-1] for x in site.inputs(*given[0])]
    assert len(found) == 3
    assert all(torch.equal(x, want.reshape(-1, want.shape[-1])) for x, want in zip(found, given[0], strict=True))


@torch.no_grad()
@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_are_seen_with_the_tokens_that_are_sent_to_them(kind):
    """What the slices give, weighted and summed by hand, is what the module returns."""
    model = MIXTURES[kind]()
    experts = next(m for m in model.modules() if hasattr(m, "num_experts") and hasattr(m, "gate_up_proj"))
    for site in every_site(model):
        if site.module is experts:
            nn.init.normal_(site.tensor)
    calls = []
    handle = experts.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    model(input_ids=tokens())
    handle.remove()
    ((args, kwargs),) = calls
    found = dict(ExpertsAdapter.inputs(experts, Call(args, kwargs), ("gate_up_proj", "down_proj")))
    x, up, down = args[0], found["gate_up_proj"], found["down_proj"]
    assert len(up) == len(down) == 4 and [len(each) for each in up] == [len(each) for each in down]
    if kind != "llama4":
        index = args[1]
        for expert, rows in enumerate(up):
            want = x[(index == expert).any(1)]
            assert len(rows) == len(want) and torch.allclose(rows.T @ rows, want.T @ want, atol=1e-4)
    by_name = {site.name.rpartition(".")[2]: site for site in every_site(model) if site.module is experts}
    assert by_name["gate_up_proj"].shape == (4, 96, 32) and by_name["down_proj"].shape == (4, 32, 48)
    for expert in range(4):
        gate_up = up[expert] @ by_name["gate_up_proj"].weight()[expert].T
        if kind == "mixtral":
            gate, value = gate_up.chunk(2, -1)
            assert torch.allclose(nn.functional.silu(gate) * value, down[expert], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", MIXTURES)
def test_padding_reaches_no_expert(kind):
    model = MIXTURES[kind]()
    given = batches("llama", 1)[0]
    mask = given["attention_mask"] != 0
    sites = [site for site in find_sites(model) if "experts" in site.name]
    assert len(sites) == 4

    def seen():
        collector = Collector(
            sites, ("gram",), lambda x: mask if x.shape[:-1] == mask.shape or x.shape[0] == 48 else None
        )
        model(**given)
        collector.close()
        return {site.name: collector.result(site) for site in sites[:1]}

    ((_, before),) = seen().values()
    assert int(before["tokens"].sum()) == int(mask.sum()) * (1 if kind == "llama4" else 2)
    given["input_ids"] = given["input_ids"] + 5 * ~mask
    ((_, after),) = seen().values()
    assert torch.allclose(before["gram"], after["gram"], atol=1e-4)


def test_padding_counts_in_no_statistic_of_a_recurrent_layer():
    model = Called(nn.LSTM(12, 8, bidirectional=True, batch_first=True))
    x = correlated((3, 7, 12), 0)
    mask = torch.arange(7).expand(3, 7) < torch.tensor([[7], [4], [5]])
    sites = every_site(model)
    collector = Collector(sites, ("gram",), lambda _: mask)
    model(x)
    collector.close()
    for site in sites:
        count, stats = collector.result(site)
        assert count == 16
        if "ih" in site.name:
            assert torch.allclose(stats["gram"][0], x[mask].T @ x[mask], atol=1e-4)
    apart = Collector(sites, ("gram",), lambda _: None)
    for row, keep in zip(x, mask, strict=True):  # one at a time, cut where its padding begins: forward states agree
        model(row[keep].unsqueeze(0))
    apart.close()
    one, two = (each.result(sites[1])[1]["gram"] for each in (collector, apart))
    assert sites[1].name == "layer.weight_hh_l0" and torch.allclose(one, two, atol=1e-4)


def test_names_and_what_is_left_out():
    model, _ = make("attention")
    assert [site.name for site in every_site(model)] == ["layer.in_proj_weight", "layer.out_proj"]
    assert [site.name for site in find_sites(model, include="layer.*")] == ["layer.in_proj_weight", "layer.out_proj"]
    assert [site.name for site in find_sites(model, exclude="*.out_proj")] == ["layer.in_proj_weight"]
    lm = llama()
    assert "model.embed_tokens" not in [site.name for site in find_sites(lm, include="*")]
    assert [site.name for site in find_sites(lm, include="*_tokens")] == []
    assert [site.name for site in find_sites(lm, include="embed_tokens")] == ["model.embed_tokens"]  # tied, but named
    table = nn.ModuleDict(
        {"table": nn.Embedding(9, 8), "depth": nn.Conv2d(4, 8, 3, groups=4), "plain": nn.Linear(2, 2)}
    )
    sites, skipped = select_sites(table)
    assert [site.name for site in sites] == ["plain"]
    assert skipped["table"] == "embedding; name it in include= to prune it"
    assert skipped["depth"] == "depthwise convolution; name it in include= to prune it"
    assert [site.name for site in find_sites(table, include=["depth", "t*"])] == ["depth"]


def test_weights_that_are_computed_at_each_call_are_no_sites():
    normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3))
    assert every_site(nn.Sequential(normed, nn.LazyConv2d(3, 3))) == []


def test_groups_of_a_pattern_lie_along_the_channels():
    conv = nn.Conv2d(6, 4, 2)
    (site,) = every_site(Called(conv))
    assert site.shape == (1, 4, 24) and site.grid == (1, 4, 6)
    assert torch.equal(site.weight()[0, 1, 6:12], conv.weight[1, :, 0, 1])
    with pytest.raises(ZeroskipError, match="6 inputs are not a multiple of 4"):
        Pattern.parse("2:4").check(site.grid, site.name)
