"""Layers that read the same tensor: found, joined where that is faster, and never wrong."""

import copy
import io
import threading

import pytest
import torch
from planning import inject
from torch import nn

import zeroskip as zs
from zeroskip.nn import PackedLinear, Siblings
from zeroskip.ops import call_many
from zeroskip.planning.invariant import make_invariant
from zeroskip.planning.siblings import find_siblings, fuse, join, part

SHAPES = {"q": (48, 32), "k": (16, 32), "v": (16, 32)}


def layer(m, k, seed, bias=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, k, generator=generator)
    weight[weight.abs() < 0.7] = 0
    return PackedLinear.from_packed(
        zs.pack(weight, format="bitmask"), torch.randn(m, generator=generator).to(dtype) if bias else None
    )


class Block(nn.Module):
    """Queries, keys and values of one tensor, and layers that only look like theirs."""

    def __init__(self, bias=False):
        super().__init__()
        for seed, (name, (m, k)) in enumerate(SHAPES.items()):
            setattr(self, name, layer(m, k, seed, bias))
        self.copied, self.twice, self.moved = layer(16, 32, 7), layer(32, 32, 8), layer(16, 32, 9)

    def forward(self, x):
        y = torch.cat([self.q(x), self.k(x), self.v(x), self.copied(x.clone())], -1)
        z = self.twice(self.twice(x))
        z += 1
        first = self.moved(z)
        return y, first


X = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))


def groups_of(model):
    found = {id(m.siblings): m.siblings for m in model.modules() if isinstance(m, PackedLinear) and m.siblings}
    return list(found.values())


def test_tracing_finds_those_that_read_one_tensor():
    block = Block()
    assert find_siblings(block, lambda: block(X)) == [["q", "k", "v"]]

    class InPlace(Block):
        def forward(self, x):
            x = x.clone()
            a = self.q(x)
            x += 1
            return a, self.k(x)

    block = InPlace()
    assert find_siblings(block, lambda: block(X)) == []
    assert not any(module._forward_pre_hooks for module in block.modules())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_joined_layers_give_the_same_bits(bias, dtype):
    block = Block(bias)
    for x in (X.to(dtype), X[:, None].to(dtype), X.to(dtype).t().contiguous().t(), X[:0].to(dtype)):
        apart = block(x)
        Siblings([block.q, block.k, block.v]).join()
        for _ in range(2):
            together = block(x)
            assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))
        assert x.numel() == 0 or block.q.siblings._last is None  # nothing of the activations is kept
        part(block)


def test_another_tensor_or_order_is_computed():
    block = Block()
    want = {name: getattr(block, name)(X) for name in SHAPES}
    Siblings([block.q, block.k, block.v]).join()
    other = X + 1
    assert torch.equal(block.k(X), want["k"])  # before the first
    block.q(other)
    assert torch.equal(block.k(X), want["k"]) and torch.equal(block.v(X), want["v"])
    assert torch.equal(block.q(X), want["q"]) and torch.equal(block.v(X), want["v"])
    x = X.clone()
    block.q(x)
    x += 1
    assert torch.equal(block.v(x), block.v(X + 1))  # not what is kept of the tensor as it was
    assert torch.equal(block.q(x), block.q(X + 1)) and torch.equal(block.k(X + 1), block.k(X + 1))


def test_a_result_is_handed_out_once():
    block = Block()
    want = block.k(X)
    Siblings([block.q, block.k, block.v]).join()
    block.q(X)
    block.k(X).zero_()  # as an activation in place would
    assert torch.equal(block.k(X), want)


def test_threads_get_their_own_results():
    block = Block()
    inputs = [torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    want = [block(x) for x in inputs]
    Siblings([block.q, block.k, block.v]).join()
    wrong = []

    def run(place):
        for _ in range(200):
            got = block(inputs[place])
            if not all(torch.equal(a, b) for a, b in zip(got, want[place], strict=True)):
                wrong.append(place)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_copies_pickles_and_torch_compile():
    block = Block(bias=True)
    want = block(X)
    Siblings([block.q, block.k, block.v]).join()
    twin = copy.deepcopy(block)
    assert twin.q.siblings is twin.k.siblings and twin.q.siblings is not block.q.siblings
    assert twin.q.siblings.layers[0] is twin.q
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert again.v.siblings.layers == (again.q, again.k, again.v)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(block, (X,)).module()
    for model in (twin, again, compiled, exported):
        assert all(torch.equal(a, b) for a, b in zip(model(X), want, strict=True))
    assert all("siblings" not in name for name in block.state_dict())


def test_bad_input_is_refused_as_ever():
    block = Block()
    Siblings([block.q, block.k, block.v]).join()
    for x in (torch.randn(2, 31), torch.randint(0, 4, (2, 32)), torch.randn(2, 32, dtype=torch.float64)):
        with pytest.raises(zs.ZeroskipError):
            block.q(x)
    parts = [(block.q.weight, torch.zeros(3), 48, 0, None)]
    with pytest.raises(zs.ZeroskipError, match="bias"):
        call_many(X, parts)


@pytest.mark.parametrize("faster", ["together", "apart"])
def test_compile_joins_what_gains_and_load_does_too(faster, monkeypatch, tmp_path):
    from tiny_models import llama

    times = {"apart": 1.0, "together": 1.0, faster: 0.5}
    inject(monkeypatch, lambda name: times.get(name, 0.1 if name.startswith("bitmask") else 1.0))
    model = llama()
    zs.prune(model, "magnitude", sparsity=0.5)
    dense = copy.deepcopy(model)
    zs.compile(model, tokens=(1, 4))
    plan = zs.plan_of(model)
    layers = "model.layers.0"
    expected = [
        [f"{layers}.self_attn.{name}_proj" for name in "qkv"],
        [f"{layers}.mlp.{n}_proj" for n in ("gate", "up")],
    ]
    got = [group.names for group in plan.fused if ".0." in group.names[0]]
    assert sorted(got) == sorted(expected) * (faster == "together")
    assert len(groups_of(model)) == 6 * (faster == "together")
    assert ("computed together: 2.00 to 2.00x" in str(plan)) == (faster == "together")
    zs.save(model, tmp_path / "out")
    loaded = zs.load(tmp_path / "out")
    assert len(groups_of(loaded)) == len(groups_of(model))
    assert [g.names for g in zs.plan_of(loaded).fused] == [g.names for g in plan.fused]
    ids = torch.arange(12).reshape(2, 6)
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert (model(ids).logits - dense(ids).logits).abs().max() < 1e-4
    again = zs.compile(copy.deepcopy(dense), tokens=(1, 4), plan=plan)
    assert len(groups_of(again)) == len(groups_of(model))
    headless = type(loaded.model).from_pretrained(tmp_path / "out")
    assert len(groups_of(headless)) == len(groups_of(model))
    make_invariant(loaded, 2)
    assert not groups_of(loaded)
    if faster == "together":  # taking the plan off leaves no group that points to layers of before
        zs.compile(model, tokens=(1,))
        assert all(each in set(model.modules()) for group in groups_of(model) for each in group.layers)


def test_join_passes_over_what_does_not_fit():
    block = Block()
    from zeroskip.planning.plan import Fused

    join(block, [Fused(["q", "nothing"]), Fused(["k"])])
    assert not groups_of(block)
    assert fuse(nn.Sequential(nn.Linear(2, 2)), lambda: None, (1,)) == []
