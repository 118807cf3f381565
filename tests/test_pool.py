"""Large outputs take turns in the same memory: never while anybody looks at it, and never more than two blocks."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import zeroskip as zs
from zeroskip import _core, ops

TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
ROWS, M, K = 8192, 1040, 16  # 34 MB of fp32: a block that malloc would map anew
MB = 1 << 20


def take(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_dlpack(_core.output(list(shape), TYPES[dtype]))


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Let the pool hold two blocks that no test asks for."""
    small = [take(1), take(1)]
    del small


def layer(m: int = M) -> tuple[zs.Packed, Tensor]:
    weight = torch.randn(m, K, generator=torch.Generator().manual_seed(m))
    return zs.pack(weight, "dense"), weight


def run_alone(script: str) -> None:
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# What a tensor of the pool is


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(3, 5), (7,), (2, 3, 4, 5, 6), (0, 4), (4, 0), (1, 1), ()])
def test_shapes_and_types(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    y = take(*shape, dtype=dtype)
    plain = torch.empty(shape, dtype=dtype)
    assert (y.shape, y.dtype, y.stride(), y.device) == (plain.shape, dtype, plain.stride(), plain.device)
    assert y.is_contiguous()
    assert not y.requires_grad
    assert y.data_ptr() % 64 == 0
    y.fill_(2)
    assert torch.equal(y, plain.fill_(2))


@pytest.mark.parametrize(
    ("shape", "kind", "error"),
    [
        ([-1, 4], 1, ValueError),
        ([1 << 40, 1 << 40], 1, ValueError),
        ([1 << 62], 2, ValueError),
        ([(1 << 62) - 1], 2, MemoryError),  # whose size, rounded up, is no number
        ([1 << 50], 1, MemoryError),
        ([4], 0, ValueError),
        ([4], 4, ValueError),
    ],
)
def test_sizes_that_cannot_be(shape: list[int], kind: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        _core.output(shape, kind)


def test_a_capsule_that_nobody_takes_gives_its_block_back() -> None:
    y = take(1000)
    at = y.data_ptr()
    del y
    capsule = _core.output([1000], 1)
    del capsule
    assert take(1000).data_ptr() == at


# Taking turns


def test_memory_is_used_again() -> None:
    y = take(1000)
    at = y.data_ptr()
    assert take(1000).data_ptr() != at
    del y
    assert take(900).data_ptr() == at
    z = take(600)
    assert z.data_ptr() == at
    del z
    assert take(490).data_ptr() != at, "a block more than twice as large is left for others"


def test_a_gap_is_filled_before_a_block_is_freed() -> None:
    first, second = take(1000), take(3000)
    at = {first.data_ptr(), second.data_ptr()}
    del first, second
    for _ in range(5):  # one block comes and goes, the other stays
        assert take(3000).data_ptr() in at
    for _ in range(5):
        assert take(1000).data_ptr() in at
    assert {take(1000).data_ptr(), take(3000).data_ptr()} == at


def test_at_most_two_blocks_are_kept() -> None:
    size = 48 * MB
    blocks = [take(size // 4).fill_(1) for _ in range(5)]
    full = resident()
    del blocks
    freed = full - resident()
    assert 2.5 * size < freed < 3.5 * size, freed / size
    again = [take(size // 4) for _ in range(2)]  # the two are given out as they are
    assert abs(full - freed - resident()) < size / 2
    assert all(float(each[-1]) == 1 for each in again)


VIEWS: dict[str, Callable[[Tensor], object]] = {
    "row": lambda y: y[3],
    "transposed": lambda y: y.T,
    "bytes": lambda y: y.view(torch.uint8),
    "detached": lambda y: y.detach(),
    "chunk": lambda y: y.chunk(4, -1)[2],
    "numpy": lambda y: y.numpy(),
    "numpy of a row": lambda y: y[5].numpy()[2:],
    "storage": lambda y: y.untyped_storage(),
    "data": lambda y: y.data,
    "dlpack": lambda y: torch.from_dlpack(y[2:]),
    "memoryview": lambda y: memoryview(y.numpy()),
    "saved for backward": lambda y: y * torch.ones(1, requires_grad=True),
}


def bytes_of(view: object) -> bytes:
    if isinstance(view, Tensor):
        if view.grad_fn is not None:
            (view,) = [each for each in (view.grad_fn._saved_self,) if each is not None]
        return view.detach().contiguous().numpy().tobytes()
    return bytes(view.tobytes() if hasattr(view, "tobytes") else bytes(view))


@pytest.mark.parametrize("name", VIEWS)
def test_nothing_is_overwritten_while_a_view_lives(name: str) -> None:
    y = take(64, 48)
    y.copy_(torch.arange(64 * 48.0).view(64, 48))
    at, view = y.data_ptr(), VIEWS[name](y)
    before = bytes_of(view)
    del y
    gc.collect()
    others = [take(64, 48).fill_(-1) for _ in range(4)]
    assert bytes_of(view) == before
    assert at not in [each.data_ptr() for each in others]
    del others, view
    gc.collect()
    assert take(64, 48).data_ptr() == at


# Through the ops


def test_large_outputs_of_a_layer() -> None:
    packed, weight = layer()
    x = torch.randn(ROWS, K)
    y = zs.linear(packed, x)
    wanted = torch.nn.functional.linear(x, weight)
    assert torch.allclose(y, wanted, atol=1e-4)
    at = y.data_ptr()
    z = zs.linear(packed, -x)
    assert z.data_ptr() != at
    assert torch.allclose(y, wanted, atol=1e-4)
    assert torch.equal(z, -y)
    del y
    assert zs.linear(packed, x).data_ptr() == at


def test_outputs_may_be_changed_in_place_and_kept_in_any_mode() -> None:
    packed, _ = layer()
    x = torch.randn(ROWS, K)
    with torch.inference_mode():
        y = zs.linear(packed, x)
        assert y.is_inference()
        y.relu_().add_(1)
    assert y.is_inference()
    plain = zs.linear(packed, x)
    assert not plain.is_inference()
    assert torch.equal(plain.relu_().add_(1), y)
    scale = torch.ones(1, requires_grad=True)
    (plain * scale).sum().backward()
    assert scale.grad is not None
    assert torch.isclose(scale.grad, plain.double().sum().float(), rtol=1e-3)
    assert torch.equal(torch.add(plain, 1, out=plain), y + 1)
    assert plain.requires_grad_().is_leaf
    assert torch.equal(pickle.loads(pickle.dumps(y[:9].clone())), y[:9])


def test_resizing_and_sharing() -> None:
    y = take(6, 4).fill_(3)
    with pytest.raises(RuntimeError, match="resiz"):
        y.resize_(600, 4)  # torch's own refusal: nothing behind it is written to
    y.resize_(2, 4)
    y.share_memory_()
    assert y.is_shared()
    assert torch.equal(y, torch.full((2, 4), 3.0))


def test_a_call_that_fails_gives_its_block_back() -> None:
    packed, _ = layer()
    x = torch.randn(ROWS, K)
    at = zs.linear(packed, x).data_ptr()
    with pytest.raises(zs.errors.ZeroskipError, match="no_such_kernel"):
        ops.run(packed, x, kernel="no_such_kernel")
    assert zs.linear(packed, x).data_ptr() == at


def test_a_compiled_model_keeps_its_outputs() -> None:
    packed, _ = layer()

    def twice(x: Tensor) -> tuple[Tensor, Tensor]:
        return zs.linear(packed, x) + 0, zs.linear(packed, x + 1)

    x = torch.randn(ROWS, K)
    compiled = torch.compile(twice, backend="aot_eager")
    first, second = compiled(x)
    kept = first.clone(), second.clone()
    compiled(-x)
    assert torch.equal(first, kept[0])
    assert torch.equal(second, kept[1])
    assert torch.equal(second, twice(x)[1])


def test_threads_share_no_block() -> None:
    packed, _ = layer()
    wrong: list[str] = []

    def work(seed: int) -> None:
        torch.set_num_threads(1)
        x = torch.full((ROWS, K), float(seed))
        first = zs.linear(packed, x)
        for _ in range(4):
            y = zs.linear(packed, x)
            if not torch.equal(y, first):
                wrong.append(f"thread {seed}")

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


FORK = """
import os, torch, zeroskip as zs
torch.set_num_threads(1)
packed = zs.pack(torch.ones(1040, 16), "dense")
x = torch.ones(8192, 16)
kept, gone = zs.linear(packed, x), zs.linear(packed, x)
at = gone.data_ptr()
del gone
child = os.fork()
y = zs.linear(packed, x if child else 2 * x)
good = y.data_ptr() == at and bool((y == (16 if child else 32)).all()) and bool((kept == 16).all())
if not child:
    del y, kept
    os._exit(0 if good else 1)
_, status = os.waitpid(child, 0)
assert status == 0 and good and bool((y == 16).all())
"""


def test_a_forked_child_has_blocks_of_its_own() -> None:
    run_alone(FORK)


ENDS = """
import ctypes, torch
from zeroskip import _core
def take():
    return torch.from_dlpack(_core.output([9 << 20], 1)).fill_(1)
class Node: pass
node = Node()
node.itself, node.y = node, take()
leaked, left = take(), _core.output([9 << 20], 1)
ctypes.pythonapi.Py_IncRef(ctypes.py_object(leaked))
"""


def test_outputs_may_outlive_the_interpreter() -> None:
    run_alone(ENDS)
