"""What the kernel tests compare with: a dense product in float64, and the error that a kernel may make.

Formats and kernels come from the registry. A new one is tested at once: `examples` offers weights of several kinds of
sparsity, and each format takes those that it accepts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import zeroskip as zs
from zeroskip import _core
from zeroskip.formats.base import get
from zeroskip.formats.blob import VALUES
from zeroskip.ops import ACTIVATIONS
from zeroskip.quantize import LIMIT, quantize

TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a unit in the last place
TINY = {torch.float32: 1e-30, torch.bfloat16: 1e-30, torch.float16: 2.0**-24}  # subnormals are flushed or coarse
GUARD = 64  # elements before and after y that must stay untouched

Case = tuple[str, str, str]  # format, values, kernel


def cases() -> list[Case]:
    """Every kernel that can run here under the ISA row in force."""
    isa = zs.isa()
    rows = isa.available[: isa.available.index(isa.active) + 1]
    name = re.compile(rf"spmm_(.+)_({'|'.join([*VALUES, *LIMIT])})(?:_[a-z]+)?_({'|'.join(rows)})")
    found = [(match[1], match[2], match[0]) for each in _core.all_kernels() if (match := name.fullmatch(each))]
    return sorted(found)


def mask_strips(m: int, k: int, strip: int, generator: torch.Generator) -> Tensor:
    """Half of each group of columns, shared by strips of rows; the group is the largest that divides both k and 64."""
    group = next(g for g in (16, 8, 4, 2, 1) if k % g == 0)
    score = torch.rand(-(-m // strip), k // group, group, generator=generator)
    kept = score.argsort(2) < max(1, group // 2)
    return kept.flatten(1).repeat_interleave(strip, 0)[:m]


def _rows(m: int, k: int, generator: torch.Generator) -> Tensor:
    mask = torch.rand(m, k, generator=generator) < 0.3
    mask[torch.rand(m, generator=generator) < 0.5] = False
    return mask


def _last(m: int, k: int, generator: torch.Generator) -> Tensor:
    mask = torch.zeros(m, k, dtype=torch.bool)
    mask[-1, -1] = True
    return mask


SPARSIFIERS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "half": lambda m, k, g: torch.rand(m, k, generator=g) < 0.5,
    "tenth": lambda m, k, g: torch.rand(m, k, generator=g) < 0.1,
    "strips": lambda m, k, g: mask_strips(m, k, 64, g),
    "short strips": lambda m, k, g: mask_strips(m, k, 16, g),
    "empty rows": _rows,
    "dense": lambda m, k, g: torch.ones(m, k, dtype=torch.bool),
    "empty": lambda m, k, g: torch.zeros(m, k, dtype=torch.bool),
    "last": _last,
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stored(weight: Tensor, values: str) -> Tensor:
    """What is left of a weight that is stored as `values`: rounded, and fp32 if these are integers."""
    return weight.to(VALUES[values]) if values in VALUES else quantize(weight, values).dequantize()


def examples(name: str, m: int, k: int, values: str, seed: int = 0, integers: bool = False) -> Iterator[Tensor]:
    """Weights [m, k] that the format `name` accepts and stores exactly, one for each kind of sparsity.

    With `integers` they are whole numbers below 4; where the values are integers too, they need scales of 1.
    """
    generator = torch.Generator().manual_seed(seed)
    for sparsify in SPARSIFIERS.values():
        weight = torch.randn(m, k, generator=generator)
        if integers:
            weight = torch.randint(1, 4, (m, k), generator=generator) * weight.sign()
        weight = torch.where(sparsify(m, k, generator), weight, 0.0)
        weight = weight if integers and values in LIMIT else stored(weight, values)
        if get(name).accepts(weight) is None:
            yield weight


def example(name: str, m: int, k: int, values: str, seed: int = 0) -> Tensor:
    """One such weight; a format that accepts none needs a row in SPARSIFIERS."""
    for weight in examples(name, m, k, values, seed):
        return weight
    raise LookupError(f"no sparsifier makes a {m} x {k} weight for format {name!r}: add one to oracle.SPARSIFIERS")


def activate(z: Tensor, activation: str) -> Tensor:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "none": lambda z: z,
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
        "silu": F.silu,
        "relu2": lambda z: F.relu(z) ** 2,
    }
    return functions[activation](z)


def expect(
    weight: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    kernel: str = "",
    group_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """y [tokens, m] in float64, and how far each element may be off.

    A sum of n terms may be off by 2 n eps (|W| |x|); a kernel of the row `amx` may round x to bf16 first; y is rounded
    to its type. The activations are good to 1e-6 |z|. A kernel of integers rounds x to 127 steps of the largest in its
    group of inputs.
    """
    w, a = weight.double(), x.double()
    z, size = a @ w.T, a.abs() @ w.abs().T
    eps = 2 * ((weight != 0).sum(1) + 4) * EPS[torch.float32]
    if kernel.endswith("_bf16_amx") and x.dtype != torch.bfloat16:
        eps = eps + EPS[torch.bfloat16]
    off = eps * size
    if re.search(rf"_({'|'.join(LIMIT)})_", kernel):
        off = off + 1.0001 * _groups(a, group_size).amax(2) / 254 @ _groups(w, group_size).sum(2).T
    if bias is not None:
        z = z + bias.double()
        off = off + 2 * EPS[torch.float32] * (size + bias.double().abs())
    y = activate(z, activation)
    if activation == "relu2":
        off = 2 * z.abs() * off + off**2 + 1e-6 * y
    elif activation != "none":
        off = 1.2 * off + 1e-6 * z.abs()
    return y, off * 1.01 + (EPS[x.dtype] + EPS[torch.float32]) * (y.abs() + off) + TINY[x.dtype]


def _groups(matrix: Tensor, size: int) -> Tensor:
    return F.pad(matrix.abs(), (0, -matrix.shape[1] % size)).view(len(matrix), -1, size)


def call(
    packed: zs.Packed,
    x: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    kernel: str | None = None,
    threads: int = 1,
) -> Tensor:
    """Run a kernel on a y that holds NaN, and see that it wrote y, all of it and nothing else."""
    (m, k), tokens = packed.shape, x.shape[0]
    store = torch.full((tokens * m + 2 * GUARD,), torch.nan, dtype=x.dtype)
    y = store[GUARD : GUARD + tokens * m].view(tokens, m)
    bias = None if bias is None else bias.float().contiguous()
    address = 0 if bias is None else bias.data_ptr()
    _core.linear(
        x.data_ptr(), TYPES[x.dtype], tokens, k, packed.blob.data_ptr(), packed.nbytes, address,
        ACTIVATIONS.index(activation), y.data_ptr(), m, threads, kernel,
    )  # fmt: skip
    assert store[:GUARD].isnan().all(), "wrote before y"
    assert store[GUARD + tokens * m :].isnan().all(), "wrote beyond y"
    return y


def verify(y: Tensor, weight: Tensor, x: Tensor, bias: Tensor | None = None, activation: str = "none",
           kernel: str = "", group_size: int = 64) -> None:  # fmt: skip
    """Assert that every element of y is within the bound."""
    expected, bound = expect(weight, x, bias, activation, kernel, group_size)
    off = (y.double() - expected).abs()
    bad = ~(off <= bound)  # NaN is bad
    if bad.any():
        token, row = bad.nonzero()[0].tolist()
        raise AssertionError(
            f"{kernel} {list(weight.shape)} {weight.dtype}, x {list(x.shape)} {x.dtype}, {activation}: "
            f"{int(bad.sum())} of {bad.numel()} wrong, first at token {token}, row {row}: "
            f"{y[token, row].item()} instead of {expected[token, row].item()}, bound {bound[token, row].item():.3g}"
        )


def holds(call: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether rows drawn from x in any number and order have the bits that they have alone."""
    alone = torch.cat([call(row) for row in x.split(1)])
    for count in (*range(1, 20), 31, 50, 100):
        drawn = torch.randint(len(x), (count,), generator=torch.Generator().manual_seed(count))
        if not torch.equal(call(x[drawn]), alone[drawn]):
            return False
    return True
