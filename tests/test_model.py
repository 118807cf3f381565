"""Sites: which there are, how they are seen and written."""

import pytest
import torch
from tiny_models import gpt2, llama
from torch import nn

from zeroskip.compile import compile
from zeroskip.errors import ZeroskipError
from zeroskip.model import Site, find_sites, replace, select_sites
from zeroskip.prune import prune


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(8, 4), "b": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))})


def names(*args, **kwargs) -> list[str]:
    return [site.name for site in find_sites(*args, **kwargs)]


def test_order_include_and_exclude():
    model = net()
    assert names(model) == ["a", "b.0", "b.2"]
    assert names(model, include="b.*") == ["b.0", "b.2"]
    assert names(model, include=["2", "a"]) == ["a", "b.2"]
    assert names(model, include="re:b\\.[0-9]", exclude="re:.*2") == ["b.0"]
    assert names(model, exclude=None) == ["a", "b.0", "b.2"]
    assert select_sites(model, exclude=["a"])[1] == {"a": "excluded by 'a'"}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_layer_without_a_weight_is_no_site():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(0, 4), nn.Linear(4, 0))
    assert names(model) == ["0"]
    prune(model, "magnitude", pattern="2:4")
    compile(model, tokens=1, budget_s=0.01)


def test_patterns_that_name_nothing():
    with pytest.raises(ZeroskipError, match=r"include 'b\.1x' names no site"):
        find_sites(net(), include="b.1x")
    with pytest.raises(ZeroskipError, match="not a regular expression"):
        find_sites(net(), include="re:(")
    with pytest.raises(ZeroskipError, match="exclude 'classifier' names no site"):
        find_sites(net(), exclude=["classifier"])
    assert names(net(), exclude=["lm_head", ""]) == ["a", "b.0", "b.2"]


def test_tied_weights_are_left_out_unless_named():
    model = llama()
    assert "lm_head" not in names(model, exclude=None)
    assert "tied" in select_sites(model, exclude=None)[1]["lm_head"]
    assert "lm_head" not in names(model, include="*", exclude=None)
    assert names(model, include="lm_head", exclude=None) == ["lm_head"]


@pytest.mark.parametrize("turned", [False, True])
def test_two_parameters_on_one_memory_are_tied(turned):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    first = model[0].weight.data
    model[2].weight = nn.Parameter(first.t() if turned else first)
    assert names(model) == [] and "tied" in select_sites(model)[1]["2"]
    report = prune(model, "magnitude", sparsity=0.5, include=["0", "2"])
    assert [row.name for row in report.rows] == ["2"] and int((first == 0).sum()) == 2048
    with pytest.raises(ZeroskipError, match="2: stream=True would part it from another Parameter"):
        prune(model, "magnitude", sparsity=0.5, include=["0", "2"], journal="unused", stream=True)


def test_pieces_of_one_buffer_are_not_tied():
    model, buffer = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.rand(16, 8)
    model[0].weight, model[1].weight = (nn.Parameter(part) for part in buffer.split(8))
    assert names(model) == ["0", "1"]
    assert names(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to("meta")) == ["0", "1"]


def test_a_conv1d_is_seen_transposed_and_written_back():
    model = gpt2()
    site = next(site for site in find_sites(model) if site.name.endswith("c_fc"))
    stored = site.module.weight
    assert site.shape == (1, 128, 32) and stored.shape == (32, 128)
    assert site.weight().data_ptr() == stored.data_ptr()
    x = torch.randn(2, 5, 32)
    assert torch.allclose(site.inputs(x)[0] @ site.weight()[0].t() + site.bias, site.module(x).view(10, -1), atol=1e-5)
    new = torch.randn(1, 128, 32)
    site.write(new)
    assert torch.equal(stored.detach(), new[0].t()) and site.module.weight is stored


def test_write_makes_zeros_positive_and_refuses_overflow():
    site = Site("x", nn.Linear(2, 1).half())
    site.write(torch.tensor([[[-0.0, -1e-30]]]))
    assert not torch.signbit(site.module.weight).any()
    with pytest.raises(ZeroskipError, match="overflows"):
        site.write(torch.tensor([[[1.0, 1e6]]]))
    assert (site.module.weight == 0).all()


def test_replace():
    model = net()
    replace(model, "b.2", nn.Identity())
    assert isinstance(model["b"][2], nn.Identity)
    with pytest.raises(ZeroskipError, match=r"no module 'b\.7'"):
        replace(model, "b.7", nn.Identity())
    with pytest.raises(ZeroskipError, match="no module 'c'"):
        replace(model, "c.7", nn.Identity())
