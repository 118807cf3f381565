"""`convolve`: patches cut as the kernel packs them, against float64 and, bit for bit, `linear` over rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import conv1d, conv2d, conv3d

from zeroskip import _core, ops
from zeroskip.conv_ops import convolve
from zeroskip.errors import ZeroskipError
from zeroskip.formats import pack
from zeroskip.sites.conv import ConvAdapter, patches

CONVS: list[Any] = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
PLAIN: list[Any] = [conv1d, conv2d, conv3d]
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp32"}


def made(conv: nn.Module, zeros: float) -> torch.Tensor:
    """Set part of the weights to zero; return them as the matrix over the patches."""
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        conv.weight.mul_(torch.rand(conv.weight.shape, generator=draw) >= zeros)
    return ConvAdapter.view(conv, "weight", conv.weight.detach())[0].contiguous()


def geometry(conv: Any) -> list[int]:
    return [*conv.kernel_size, *conv.stride, *conv.dilation, *conv.padding]


def both(conv: Any, x: torch.Tensor, weight: torch.Tensor, kind: str) -> None:
    packed = pack(weight, kind, values=DTYPES[x.dtype])
    rows, m = patches(conv, x)[0], len(weight)
    want = PLAIN[x.dim() - 3](
        x.double(), conv.weight.double(), None, conv.stride, conv.padding, conv.dilation
    ).movedim(1, -1)  # fmt: skip
    scale = (rows.double().abs() @ weight.double().abs().t()).view(want.shape)
    for kernel in ops.kernels(packed):
        y = convolve(x.movedim(1, -1), packed.blob, conv.bias, m, geometry(conv), kernel)
        assert y.shape == want.shape and y.dtype == x.dtype
        assert torch.equal(y.view(-1, m), ops.run(packed, rows, conv.bias, None, kernel)), kernel
        exact = want if conv.bias is None else want + conv.bias.double()
        bound = 1e-5 if x.dtype == torch.float32 else 1e-2
        assert bool(((y.double() - exact).abs() <= bound * (scale + exact.abs()) + 1e-30).all()), kernel


@settings(max_examples=60, deadline=None)
@given(st.data())
@torch.inference_mode()
def test_any_geometry(data: st.DataObject) -> None:
    axes = data.draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(axes))

    kernel, stride, dilation, padding = each(1, 3), each(1, 3), each(1, 2), each(0, 3)
    space = [
        max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) + data.draw(st.integers(0, 5)) for i in range(axes)
    ]
    channels, outputs, batch = (data.draw(st.integers(1, high)) for high in (21, 35, 3))
    torch.manual_seed(0)
    conv = CONVS[axes - 1](channels, outputs, kernel, stride, padding, dilation, bias=data.draw(st.booleans()))
    dtype = data.draw(st.sampled_from(list(DTYPES)))
    x = torch.randn(batch, channels, *space).to(dtype)
    both(conv, x, made(conv, 0.6), data.draw(st.sampled_from(["csr", "bitmask", "dense"])))


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["csr", "bitmask", "dense"])
def test_several_passes_and_threads(kind: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 40, 3, padding=1)
    x = torch.randn(2, 4, 41, 39)
    weight = made(conv, 0.8)
    both(conv, x, weight, kind)
    packed, before = pack(weight, kind), torch.get_num_threads()
    one = convolve(x.movedim(1, -1), packed.blob, None, 40, geometry(conv))
    try:
        torch.set_num_threads(3)
        assert torch.equal(convolve(x.movedim(1, -1), packed.blob, None, 40, geometry(conv)), one)
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def test_nan_and_inf_stay_where_their_patches_are() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, padding=1, bias=False)
    weight = made(conv, 0.5)
    weight[:, :8] = 0  # no output looks at the neighbour up and to the left
    x = torch.randn(1, 8, 6, 6)
    x[0, 3, 2, 2] = float("nan")
    for kind in ("csr", "bitmask"):
        y = convolve(x.movedim(1, -1), pack(weight, kind).blob, None, 16, geometry(conv))[0]
        bad = y.isnan().any(-1)
        assert not bool(bad[3, 3]) and bool(bad[1:4, 1:4].sum() == 8) and int(bad.sum()) == 8


def test_what_does_not_fit_is_refused() -> None:
    conv = nn.Conv2d(4, 5, 3)
    blob = pack(made(conv, 0.5), "csr").blob
    x = torch.randn(1, 9, 9, 4)
    with pytest.raises(ZeroskipError, match="too small for a kernel of \\[3, 3\\]"):
        convolve(x[:, :2], blob, None, 5, geometry(conv))
    with pytest.raises(ZeroskipError, match="the packed weight is 5 x 36, the call has 5 outputs and 27 inputs"):
        convolve(x[..., :3], blob, None, 5, geometry(conv))
    with pytest.raises(ZeroskipError, match="expected x \\[batch, \\*space, channels\\]"):
        convolve(x[0], blob, None, 5, geometry(conv))
    with pytest.raises(ZeroskipError, match="x is torch\\.float64"):
        convolve(x.double(), blob, None, 5, geometry(conv))
    with pytest.raises(ZeroskipError, match="bias has shape"):
        convolve(x, blob, torch.zeros(4), 5, geometry(conv))
    assert convolve(x[:0], blob, None, 5, geometry(conv)).shape == (0, 7, 7, 5)
    sizes = [1, 4, 1, 9, 9, 1, 3, 3, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 7, 7]
    y = torch.empty(49, 5)
    for place, value, problem in (
        (0, -1, "out of range"),
        (4, 1 << 40, "out of range"),
        (9, 0, "out of range"),
        (14, -1, "out of range"),
        (3, 8, "x has 324 elements"),
    ):
        wrong = [value if i == place else size for i, size in enumerate(sizes)]
        with pytest.raises(ValueError, match=problem):
            _core.convolve(x.data_ptr(), 1, x.numel(), wrong, blob.data_ptr(), blob.numel(), 0, 0, y.data_ptr(), 5, 1)
    with pytest.raises(ValueError, match="20 sizes"):
        _core.convolve(x.data_ptr(), 1, x.numel(), sizes[1:], blob.data_ptr(), blob.numel(), 0, 0, y.data_ptr(), 5, 1)


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["dense", "bitmask"])
@torch.inference_mode()
def test_integers_whatever_the_number_of_positions(kind: str, values: str) -> None:
    """How many tokens a block has depends on their number: what packs and what multiplies agree on it."""
    conv = nn.Conv1d(16, 24, 4)
    packed = pack(made(conv, 0.5), kind, values=values)
    for count in (1, 5, 17, 20, 33, 500, 531, 1_043):
        x = torch.randn(1, 16, count + 3)
        for kernel in ops.kernels(packed):
            y = convolve(x.movedim(1, -1), packed.blob, conv.bias, 24, geometry(conv), kernel)
            rows = patches(conv, x)[0]
            assert torch.equal(y.view(-1, 24), ops.run(packed, rows, conv.bias, None, kernel)), (kernel, count)
