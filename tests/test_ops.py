"""The op and its module in everything that torch may do with them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from oracle import EPS, cases, example, random, verify
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import zeroskip as zs
from zeroskip import _core, ops
from zeroskip.formats.base import names
from zeroskip.native import is_plain
from zeroskip.nn import PackedLinear

each_format = pytest.mark.parametrize("name", names())
M, K = 37, 64


def weight_of(name: str, values: str = "fp32", m: int = M, k: int = K, seed: int = 0) -> Tensor:
    return example(name, m, k, values, seed)


class Small(nn.Module):
    """Two packed layers around an ordinary op."""

    def __init__(self, name: str) -> None:
        super().__init__()
        first, second = weight_of(name), weight_of(name, m=16, k=48)
        self.up = PackedLinear.from_packed(zs.pack(first, name), random(M, seed=1), "relu")
        self.pad = nn.ZeroPad1d((0, 48 - M))
        self.down = PackedLinear.from_packed(zs.pack(second, name))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.pad(self.up(x)))


# Shapes and types


@each_format
def test_leading_dimensions_and_strides(name: str) -> None:
    weight = weight_of(name)
    packed = zs.pack(weight, name)
    x = random(2, 3, 5, K)
    flat = zs.linear(packed, x.reshape(-1, K))
    verify(flat, weight, x.reshape(-1, K), kernel=packed.kernel_for(30))
    assert torch.equal(zs.linear(packed, x), flat.view(2, 3, 5, M))
    assert torch.equal(zs.linear(packed, x.transpose(0, 2)), flat.view(2, 3, 5, M).transpose(0, 2))
    assert torch.equal(zs.linear(packed, torch.stack([x, x], -1)[..., 0]), flat.view(2, 3, 5, M))
    one_row = x[0, 0, :1]
    assert torch.equal(zs.linear(packed, one_row.expand(4, K)), zs.linear(packed, one_row.repeat(4, 1)))
    one = zs.linear(packed, x[0, 0, 0])
    assert one.shape == (M,)
    verify(one[None], weight, x[0, 0, :1], kernel=packed.kernel)


@each_format
@pytest.mark.parametrize("shape", [(0, K), (2, 0, K), (0, 3, K)], ids=str)
def test_zero_tokens(name: str, shape: tuple[int, ...]) -> None:
    packed = zs.pack(weight_of(name), name)
    for dtype in EPS:
        y = zs.linear(packed, torch.ones(shape, dtype=dtype), random(M), "gelu")
        assert y.shape == (*shape[:-1], M) and y.dtype == dtype


def test_bias_of_any_type_and_stride() -> None:
    packed, x, bias = zs.pack(weight_of("csr"), "csr"), random(3, K), random(M, 2)[:, 0].bfloat16()
    expected = zs.linear(packed, x, bias.float().contiguous())
    assert torch.equal(zs.linear(packed, x, bias), expected)
    assert torch.equal(zs.linear(packed, x, bias.double()), expected)


def test_x_is_not_modified() -> None:
    packed, x = zs.pack(weight_of("csr"), "csr"), random(3, K)
    before = x.clone()
    zs.linear(packed, x, random(M), "gelu")
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (torch.ones(2, K - 1), {}, rf"the packed weight is {M} x {K}"),
        (torch.ones(2, K, dtype=torch.float64), {}, "float64"),
        (torch.ones(2, K, dtype=torch.int32), {}, "int32"),
        (torch.tensor(1.0), {}, "expected x"),
        (torch.ones(2, K), {"bias": torch.ones(M + 1)}, rf"bias has shape \[{M + 1}\]"),
        (torch.ones(2, K), {"bias": torch.ones(1, M)}, "bias has shape"),
        (torch.ones(2, K), {"bias": torch.ones(M, device="meta")}, "bias is torch.float32 on meta"),
        (torch.ones(2, K), {"bias": torch.ones(M, dtype=torch.int32)}, "bias is torch.int32 on cpu"),
        (torch.ones(2, K), {"bias": torch.ones(M).to_sparse()}, "bias is no plain dense tensor"),
        (torch.ones(2, K).to_sparse(), {}, r"x is no plain dense tensor \(torch.sparse_coo\)"),
        (torch.ones(2, K), {"activation": "gleu"}, "did you mean 'gelu'"),
    ],
    ids=["k", "fp64", "int32", "scalar", "bias", "2-D", "meta", "integers", "sparse", "sparse x", "activation"],
)
def test_refusals(x: Tensor, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(zs.ZeroskipError, match=message) as caught:
        zs.linear(zs.pack(weight_of("csr"), "csr"), x, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda packed: zs.linear(packed.blob, torch.ones(2, K)), r"packed is a Tensor: give what pack\(\) returns"),
        (lambda packed: zs.linear(packed, [1.0]), "x is a list: give a tensor"),
        (lambda packed: zs.linear(packed, torch.ones(2, K), bias=1.0), "bias is a float: give a tensor or None"),
        (lambda packed: zs.unpack(None), r"packed is a NoneType: give what pack\(\) returns"),
        (lambda packed: zs.pack([[1.0]]), r"weight is a list: give a tensor \[m, k\]"),
        (lambda packed: zs.save(torch.nn.Linear(2, 2), None), "directory is a NoneType: give a path"),
        (lambda packed: zs.load(3), "directory is a int: give a path"),
        (lambda packed: zs.load("here", model="there"), "model is a str: give an nn.Module or None"),
    ],
)
def test_what_is_of_another_kind_is_refused(call: Callable[[zs.Packed], object], message: str) -> None:
    with pytest.raises(zs.ZeroskipError, match=message):
        call(zs.pack(weight_of("csr"), "csr"))


def test_a_blob_that_claims_the_tallest_strip_unpacks_in_little_memory() -> None:
    weight = torch.ones(16, K)
    weight[:, ::2] = 0.0
    blob = zs.pack(weight, "strip_nm").blob.clone()
    blob[56:60] = torch.frombuffer(bytearray((1 << 30).to_bytes(4, "little")), dtype=torch.int8)
    found = _core.hash_blob(blob.data_ptr(), blob.numel())
    blob[40:48] = torch.frombuffer(bytearray(found.to_bytes(8, "little")), dtype=torch.int8)
    assert torch.equal(zs.unpack(zs.Packed.from_blob(blob)), weight)


# Choosing a kernel


@each_format
def test_kernels_run_and_refuse(name: str) -> None:
    weight = weight_of(name, "bf16")
    packed, x = zs.pack(weight, name), random(4, K)
    served = ops.kernels(packed)
    assert set(served) == {case[2] for case in cases() if case[:2] == (name, "bf16")}
    for kernel in served:
        verify(ops.run(packed, x, kernel=kernel), weight, x, kernel=kernel)
    with pytest.raises(zs.ZeroskipError, match="unknown kernel"):
        ops.run(packed, x, kernel="spmm_nothing")
    other = next(case[2] for case in cases() if case[:2] != (name, "bf16"))
    with pytest.raises(zs.ZeroskipError, match="does not serve this blob"):
        ops.run(packed, x, kernel=other)
    for kernel in set(_core.all_kernels()) - {case[2] for case in cases()}:
        with pytest.raises(zs.ZeroskipError, match="needs an ISA row"):
            ops.run(packed, x, kernel=kernel)


def test_tuning_serves_all_blobs_of_the_key() -> None:
    first, second = (zs.pack(weight_of("csr", m=40, k=56, seed=seed), "csr") for seed in (1, 1))
    other = zs.pack(weight_of("csr", m=41, k=56), "csr")
    before = first.kernel
    slow = ops.kernels(first)[-1]
    try:
        ops.tune(first, [(4, slow), (None, before)])
        assert second.kernel_for(1) == second.kernel_for(4) == slow
        assert second.kernel_for(5) == second.kernel_for(1000) == before
        assert other.kernel == ops.kernels(other)[0]
        for buckets in ([(4, slow)], [(4, slow), (4, slow), (None, slow)], [(None, "spmm_nothing")]):
            with pytest.raises(zs.ZeroskipError):
                ops.tune(first, buckets)
    finally:
        _core.forget_tuning()
    assert first.kernel == before


# torch's machinery


@each_format
def test_inference_mode(name: str) -> None:
    model, x = Small(name), random(3, K)
    expected = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)


@each_format
def test_compile_without_graph_breaks(name: str) -> None:
    model = Small(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for tokens in (3, 5, 0):
            x = random(tokens, K)
            assert torch.equal(compiled(x), model(x))


def test_linear_itself_compiles_without_graph_breaks() -> None:
    packed, bias = zs.pack(weight_of("csr"), "csr"), random(M)
    compiled = torch.compile(lambda x: zs.linear(packed, x, bias, "gelu"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(random(3, K)), zs.linear(packed, random(3, K), bias, "gelu"))


@each_format
def test_export(name: str) -> None:
    model, tokens = Small(name), torch.export.Dim("tokens", min=0, max=512)
    program = torch.export.export(model, (random(3, K),), dynamic_shapes={"x": {0: tokens}})
    for count in (3, 7, 0):
        x = random(count, K)
        assert torch.equal(program.module()(x), model(x))


def test_opcheck() -> None:
    """The schema, the fake implementation and its dtype, as torch's own tool sees them."""
    blob = zs.pack(weight_of("csr"), "csr").blob
    for dtype in EPS:
        torch.library.opcheck(
            torch.ops.zeroskip.linear.default,
            (random(2, 3, K, dtype=dtype), blob, random(M), M, 1),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_the_dispatcher_is_left_out_only_where_nothing_looks() -> None:
    """Eager calls go straight to the kernel; what traces, watches or differentiates sees the op."""
    model, x, op = Small("csr"), random(3, K), torch.ops.zeroskip.linear.default
    plain = model(x)

    class Watching(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[object] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watching() as watching:
        assert torch.equal(model(x), plain)
    assert watching.seen.count(op) == 2
    graph = make_fx(model)(x).graph
    assert [node.target for node in graph.nodes].count(op) == 2
    assert is_plain(x) and not is_plain(x.clone().requires_grad_()) and not is_plain(nn.Parameter(x))
    assert not is_plain(torch._neg_view(x)), "its numbers are not those in memory"
    with forward_ad.dual_level():
        assert not is_plain(x), "a tangent may come along"


@each_format
def test_copies_and_casts_leave_the_blob(name: str) -> None:
    model, x = Small(name), random(3, K)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    store = io.BytesIO()
    torch.save(model, store)
    store.seek(0)
    assert torch.equal(torch.load(store, weights_only=False)(x), expected)
    for cast in (lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float64), lambda m: m.to("cpu")):
        converted = cast(copy.deepcopy(model))
        assert converted.up.weight.dtype == torch.int8
        assert torch.equal(converted.up.weight, model.up.weight)
        torch.testing.assert_close(converted(x), expected, rtol=2e-2, atol=2e-2)  # the bias was rounded
    assert copy.deepcopy(model).half()(x.half()).dtype == torch.float16


@each_format
def test_state_dict_overwrites_a_blob_in_place(name: str) -> None:
    """The handle of the old content must not serve the new one at the same address."""
    model, x = Small(name), random(3, K)
    other = copy.deepcopy(model)
    weight = weight_of(name, seed=0) * 2
    other.up.weight.data.copy_(zs.pack(weight, name).blob)
    assert not torch.equal(other(x), model(x))
    address = model.up.weight.data_ptr()
    model.load_state_dict(other.state_dict())
    assert model.up.weight.data_ptr() == address
    assert torch.equal(model(x), other(x))
    verify(model.up(x), weight, x, model.up.bias, "relu", model.up.packed.kernel_for(3))


def test_a_blob_damaged_in_place_is_refused() -> None:
    packed, x = zs.pack(weight_of("csr"), "csr"), random(3, K)
    zs.linear(packed, x)
    good = packed.blob.clone()
    packed.blob[50] = 9  # value type, in the header that is compared at each call
    with pytest.raises(zs.ZeroskipError, match="value type 9"):
        zs.linear(packed, x)
    packed.blob.copy_(good)
    zs.linear(packed, x)
    packed.blob[-1] ^= 1  # anywhere, when it is checked
    with pytest.raises(zs.ZeroskipError, match="hash"):
        zs.Packed.from_blob(packed.blob)
    with pytest.raises(zs.ZeroskipError, match="hash"):  # and the handle of what was there is gone
        zs.linear(packed, x)


def test_module_says_what_it_is() -> None:
    layer = PackedLinear.from_packed(zs.pack(weight_of("csr"), "csr"), random(M), "gelu")
    assert repr(layer) == f"PackedLinear(in_features={K}, out_features={M}, bias=True, activation=gelu)"
    assert layer.packed.shape == (M, K)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    with pytest.raises(zs.ZeroskipError, match="bias has shape"):
        PackedLinear.from_packed(layer.packed, random(M + 1))
