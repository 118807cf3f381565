"""The choice rule on injected times, and the plan as data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from zeroskip.bench.oracle import Oracle
from zeroskip.bench.timer import Race
from zeroskip.errors import ZeroskipError
from zeroskip.planning.candidates import Layout, allowed_values, check_precision
from zeroskip.planning.choose import Choice, buckets, choose
from zeroskip.planning.measure import Measured
from zeroskip.planning.tokens import Tokens

Times = dict[str, dict[int, float]]


def measured(times: Times, noise: float = 0.0, seed: int = 0) -> Measured:
    """Runners "layout/kernel" with their time at each count; layouts whose name starts with "dense" or "linear" are."""
    draw = np.random.default_rng(seed)
    labels = list(dict.fromkeys(name.rpartition("/")[0] for name in times))
    layouts = [
        _layout(label, [n.rpartition("/")[2] for n in times if n.rpartition("/")[0] == label]) for label in labels
    ]
    counts = sorted({t for each in times.values() for t in each})
    races = {
        t: Race(
            {name: list(each[t] * draw.lognormal(0, noise, 25)) for name, each in times.items() if t in each}, rounds=25
        )
        for t in counts
    }
    return Measured(layouts, races)


def _layout(label: str, kernels: list[str]) -> Layout:
    kind, values = label.split()
    dense = kind in ("linear", "onednn", "dense")
    nbytes = 200 if values == "fp32" else 100
    return Layout(label, kind, values, tuple(kernels), dense, nbytes, lambda *_: [], torch.nn.Identity)


def decide(times: Times, tokens: Any = (1, 32, 512), noise: float = 0.0) -> Choice:
    return choose(measured(times, noise), Tokens.parse(tokens))


LINEAR = {"linear fp32/torch": {1: 1.0, 32: 2.0, 512: 20.0}}


def test_a_winner_is_installed_with_its_best_kernel_in_each_bucket() -> None:
    choice = decide(
        {
            **LINEAR,
            "bitmask fp32/gemv": {1: 0.5, 32: 2.0, 512: 60.0},
            "bitmask fp32/gemm": {1: 0.9, 32: 1.0, 512: 10.0},
        }
    )
    assert choice.label == "bitmask fp32"
    assert choice.buckets == [(5, "gemv"), (None, "gemm")]
    assert choice.ratios["bitmask fp32"] == {1: 2.0, 32: 2.0, 512: 2.0}
    assert "2.00x the fastest dense layout" in choice.reason


def test_slower_at_one_count_is_not_eligible_however_fast_elsewhere() -> None:
    choice = decide({**LINEAR, "bitmask fp32/k": {1: 0.1, 32: 0.2, 512: 20.0 / 0.97}})
    assert choice.label == "linear fp32"
    assert choice.reason == "dense: linear fp32 is fastest; bitmask fp32 0.97x at 512 tokens"
    level = decide({**LINEAR, "bitmask fp32/k": {1: 0.1, 32: 0.2, 512: 20.0 / 0.985}})
    assert level.label == "bitmask fp32"


def test_eligibility_is_against_the_fastest_dense_of_each_count() -> None:
    other = {"dense fp32/a": {1: 0.4, 32: 2.5, 512: 30.0}}
    choice = decide({**LINEAR, **other, "bitmask fp32/k": {1: 0.5, 32: 1.0, 512: 10.0}})
    assert choice.label == "linear fp32", "which our dense kernel does not replace: it is slower at 32 and 512"
    assert "bitmask fp32 0.80x at 1 token" in choice.reason


def test_a_win_within_the_noise_is_no_win() -> None:
    times = {**LINEAR, "bitmask fp32/k": {1: 0.99, 32: 1.98, 512: 19.8}}
    noisy = decide(times, noise=0.2)
    assert noisy.label == "linear fp32"
    assert decide(times, noise=0.0005).label == "bitmask fp32"


def test_the_fastest_dense_is_installed_only_beyond_the_noise() -> None:
    clear = decide({**LINEAR, "onednn fp32/torch": {1: 0.9, 32: 1.5, 512: 15.0}})
    assert clear.label == "onednn fp32" and clear.reason.startswith("dense: onednn fp32 is fastest")
    level = decide({**LINEAR, "onednn fp32/torch": {1: 0.99, 32: 1.99, 512: 19.9}}, noise=0.2)
    assert level.label == "linear fp32"


def test_a_dense_layout_that_is_slower_somewhere_does_not_replace_the_layer() -> None:
    choice = decide({**LINEAR, "onednn fp32/torch": {1: 1.1, 32: 1.0, 512: 10.0}})
    assert choice.label == "linear fp32"
    assert "onednn fp32 is faster over all but not at 1 token" in choice.reason


@pytest.mark.parametrize(
    ("time", "label"), [(9.9, "csr fp32"), (9.9 / 0.981, "strip_nm bf16"), (9.9 / 0.979, "csr fp32")]
)
def test_of_sparse_layouts_that_are_as_fast_the_smallest_is_taken(time: float, label: str) -> None:
    fastest = {"csr fp32/k": {512: 9.9}, "strip_nm fp32/k": {512: 9.95}}
    smaller = {} if time == 9.9 else {"strip_nm bf16/k": {512: time}, "csr bf16/k": {512: time * 1.001}}
    assert decide({**LINEAR, **fastest, **smaller}, (512,)).label == label


def test_a_small_layout_that_does_not_beat_dense_is_not_taken() -> None:
    times = {**LINEAR, "strip_nm fp32/k": {512: 19.9}, "strip_nm bf16/k": {512: 20.1}}
    assert decide(times, (512,)).label == "strip_nm fp32"


def test_weights_decide_between_layouts() -> None:
    times = {
        **LINEAR,
        "onednn fp32/torch": {1: 0.5, 32: 2.0, 512: 19.5},
        "dense fp32/k": {1: 0.9, 32: 2.0, 512: 12.0},
    }
    assert decide(times, {1: 1000, 512: 1}).label == "onednn fp32"
    assert decide(times, {1: 1, 512: 1000}).label == "dense fp32"


def test_counts_in_a_list_matter_alike() -> None:
    # Summed in seconds the 512-token calls would hide everything else.
    times = {**LINEAR, "bitmask fp32/k": {1: 0.5, 32: 1.0, 512: 20.2}}
    assert decide(times).label == "bitmask fp32"
    assert decide(times, {1: 1, 32: 1, 512: 1000}).label == "linear fp32"


def test_nothing_sparse_says_why() -> None:
    found = measured(LINEAR)
    found.refused["strip_nm fp32"] = "no N:M@V fits its zeros"
    choice = choose(found, Tokens.parse((1, 32, 512)))
    assert choice.reason == (
        "dense: linear fp32 is fastest; no sparse format holds this weight (no N:M@V fits its zeros)"
    )


def test_a_candidate_that_is_wrong_at_some_count_is_out() -> None:
    choice = decide({**LINEAR, "bitmask fp32/k": {1: 0.1, 32: 0.1}})
    assert choice.label == "linear fp32"


def test_batch_invariant_takes_one_kernel_and_names_what_it_passed_over() -> None:
    times = {
        **LINEAR,
        "dense fp32/a": {1: 1.0, 32: 4.0, 512: 40.0},
        "dense fp32/b": {1: 2.0, 32: 2.5, 512: 25.0},
        "bitmask fp32/gemv": {1: 0.5, 32: 4.0, 512: 40.0},
        "bitmask fp32/gemm": {1: 0.9, 32: 1.0, 512: 10.0},
    }
    tokens = Tokens.parse({1: 20, 32: 1, 512: 1})
    free = choose(measured(times), tokens)
    assert free.buckets == [(5, "gemv"), (None, "gemm")] and not free.pinned and not free.passed_over
    both = choose(measured(times), tokens, {"dense fp32": ("a", "b"), "bitmask fp32": ("gemv", "gemm")})
    assert both.buckets == [(None, "gemm")] and both.pinned
    assert both.passed_over == {"bitmask fp32": pytest.approx(29 / 21, abs=1e-4)}
    assert "passed over bitmask fp32, with a kernel for each count, 1.38x as fast" in both.reason
    dense = choose(measured(times), tokens, {"dense fp32": ("a", "b")})
    assert dense.label == "dense fp32" and dense.buckets == [(None, "a")], "64 in all, and 67.5 with the other"
    assert set(dense.passed_over) == {"linear fp32", "bitmask fp32", "dense fp32"}
    assert dense.passed_over["linear fp32"] == pytest.approx(64 / 42, abs=1e-4)
    assert "no sparse layout gives a row the same bits" in dense.reason
    assert "passed over bitmask fp32 3.05x as fast, whose rows may vary" in dense.reason
    with pytest.raises(ZeroskipError, match="no dense kernel"):
        choose(measured(times), tokens, {"bitmask fp32": ("gemm",)})


def test_who_prefers_bytes_gets_the_smallest_that_is_nowhere_slower_than_the_layer() -> None:
    times = {
        **LINEAR,
        "dense int4/k": {1: 0.4, 32: 1.0, 512: 10.0},
        "bitmask int4/k": {1: 0.9, 32: 1.9, 512: 20.4},
        "csr int4/k": {1: 0.1, 32: 0.1, 512: 20.6},
    }
    found, tokens = measured(times), Tokens.parse((1, 32, 512))
    sizes = {"linear fp32": 32, "dense int4": 4, "bitmask int4": 3, "csr int4": 2}
    for layout in found.layouts:
        layout.nbytes = sizes[layout.label]
    assert choose(found, tokens).label == "dense int4"
    small = choose(found, tokens, prefer="bytes")
    assert small.label == "bitmask int4" and small.buckets == [(None, "k")], "csr is slower at 512"
    assert "0.09 of the bytes" in small.reason and "1.11x at 1, 1.05x at 32, 0.98x at 512" in small.reason
    assert "dense int4 would be 2.06x as fast" in small.reason
    assert small.ratios["bitmask int4"][1] == pytest.approx(0.4 / 0.9)
    held = choose(found, tokens, {"dense int4": ("k",), "bitmask int4": ("k",)}, prefer="bytes")
    assert held.label == "dense int4", "bitmask is slower than the dense layout that keeps a row's bits"
    assert choose(measured(LINEAR), tokens, prefer="bytes").reason == "linear fp32: the smallest, 1.00 of the bytes"


@pytest.mark.parametrize(
    ("kernels", "table"),
    [
        ({8: "a"}, [(None, "a")]),
        ({1: "a", 32: "b", 512: "c"}, [(5, "a"), (128, "b"), (None, "c")]),
        ({1: "a", 32: "a", 512: "c"}, [(128, "a"), (None, "c")]),
        ({1: "a", 2: "b"}, [(1, "a"), (None, "b")]),
    ],
)
def test_buckets(kernels: dict[int, str], table: list[tuple[int | None, str]]) -> None:
    assert buckets(kernels) == table


@pytest.mark.parametrize(
    "bad", [(), {}, (0,), (-1,), (1.5,), ("8",), (True,), 0, None, {8: 0}, {8: -1}, {8: float("inf")}]
)
def test_bad_tokens(bad: Any) -> None:
    with pytest.raises(ZeroskipError, match="tokens"):
        Tokens.parse(bad)


def test_tokens() -> None:
    assert Tokens.parse((512, 1, 1)) == Tokens((1, 512))
    assert Tokens.parse({512: 1, 1: 9}) == Tokens((1, 512), (9.0, 1.0))
    assert Tokens.parse(4) == Tokens((4,))


def test_precision() -> None:
    assert check_precision(None) is None and check_precision("bf16") == "bf16"
    for name, message in (("int5", "did you mean 'int"), ("fp23", "did you mean 'fp32'"), (16, "give fp32")):
        with pytest.raises(ZeroskipError, match=message):
            check_precision(name)  # type: ignore[arg-type]
    assert allowed_values(torch.float32, None) == ("fp32",)
    assert allowed_values(torch.float32, "bf16") == ("fp32", "bf16")
    assert allowed_values(torch.float32, "int8") == ("fp32", "bf16", "int8")
    assert allowed_values(torch.bfloat16, "int4") == ("bf16", "int8", "int4")
    assert allowed_values(torch.bfloat16, None) == ("bf16",)
    assert allowed_values(torch.bfloat16, "fp32") == ("bf16", "fp32")
    assert allowed_values(torch.float16, None) == ()
    assert allowed_values(torch.float16, "bf16") == ("fp32", "bf16")
    assert allowed_values(torch.float64, "bf16") == ()


def test_integers_of_a_solver_compete_unasked_and_alone() -> None:
    four, eight = ("int8", "int4"), ("int8",)
    assert allowed_values(torch.bfloat16, None, four) == ("bf16", *four)
    assert allowed_values(torch.float16, None, eight) == eight
    assert allowed_values(torch.float32, "bf16", four) == ("fp32", "bf16"), "only floating point was asked for"
    assert allowed_values(torch.bfloat16, "int4", eight) == ("bf16", "int8"), "8 bits are not rounded to 4"
    assert allowed_values(torch.bfloat16, "int8", four) == ("bf16", *four), "and 4 bits lose nothing"
    assert allowed_values(torch.float64, None, four) == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_oracle(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(shape, generator=generator).to(dtype) for shape in ((37, 61), (5, 61)))
    oracle = Oracle(weight, None, x)
    right = (x.double() @ weight.double().t()).to(dtype)
    values = "fp32" if dtype == torch.float32 else "bf16"
    assert oracle.problem(right, values) is None
    wrong = right.clone()
    wrong[4, 36] += 4.0
    assert "off by" in (oracle.problem(wrong, values) or "")
    wrong[0, 0] = float("nan")
    assert oracle.problem(wrong, values) == "gave NaN or Inf"
    assert "expected" in (oracle.problem(right[:, 1:], values) or "")
    if dtype == torch.float32:
        rounded = x @ weight.bfloat16().float().t()
        assert oracle.problem(rounded, "bf16") is None and oracle.problem(rounded, "fp32") is not None
