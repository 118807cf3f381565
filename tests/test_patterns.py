"""Patterns: exact counts, ties, what a shape cannot hold, names that are wrong."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeroskip.errors import ZeroskipError
from zeroskip.prune import Pattern

sizes = st.integers(1, 40)
fractions = st.floats(0, 0.999, allow_nan=False)


def scores(rows: int, columns: int, levels: int, seed: int) -> torch.Tensor:
    """Few levels make many ties."""
    return torch.randint(levels, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()


@settings(max_examples=60, deadline=None)
@given(
    sizes, sizes, fractions, st.sampled_from([1, 2, 5, 10**6]), st.integers(0, 99), st.sampled_from(["row", "tensor"])
)
def test_unstructured_counts_are_exact_and_ties_keep_the_lower_index(rows, columns, sparsity, levels, seed, scope):
    score = scores(rows, columns, levels, seed)
    keep = Pattern.parse("unstructured").select(score, sparsity, scope)
    want = torch.ones(rows * columns, dtype=torch.bool)
    total = round(rows * columns * sparsity)
    # The rule in plain words: lowest first, of equals the higher index first.
    if scope == "tensor":
        order = sorted(range(rows * columns), key=lambda i: (float(score.flatten()[i]), -i))
        want[order[:total]] = False
    else:
        each, rest = divmod(total, rows)
        by_row = [sorted(range(columns), key=lambda j, i=i: (float(score[i, j]), -j)) for i in range(rows)]
        following = sorted(range(rows), key=lambda i: (float(score[i, by_row[i][min(each, columns - 1)]]), -i))
        for i in range(rows):
            count = each + (i in following[:rest])
            want[[i * columns + j for j in by_row[i][:count]]] = False
    assert torch.equal(keep, want.view(rows, columns))


@settings(max_examples=60, deadline=None)
@given(
    sizes,
    st.integers(1, 6),
    st.integers(2, 16).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))),
    st.sampled_from([1, 3, 8, 64]),
    st.integers(0, 99),
)
def test_nm_keeps_n_of_every_m_and_strips_share_the_choice(rows, groups, nm, strip, seed):
    n, m = nm
    score = scores(rows, groups * m, 4, seed)
    pattern = Pattern.parse(f"{n}:{m}@{strip}" if strip > 1 else f"{n}:{m}")
    keep = pattern.select(score, pattern.sparsity)
    assert (keep.view(rows, groups, m).sum(2) == n).all()
    for top in range(0, rows, strip):
        part = keep[top : top + strip]
        assert (part == part[0]).all()
        summed = score[top : top + strip].sum(0).view(groups, m)
        for group in range(groups):
            best = sorted(range(m), key=lambda j, g=group: (-float(summed[g, j]), j))[:n]
            assert part[0].view(groups, m)[group].nonzero().flatten().tolist() == sorted(best)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), fractions, st.integers(0, 99))
def test_blocks_go_whole_and_exactly_as_many_as_asked(down, across, height, width, sparsity, seed):
    keep = Pattern.parse(f"block:{height}x{width}").select(scores(down * height, across * width, 5, seed), sparsity)
    grid = keep.view(down, height, across, width)
    assert (grid == grid[:, :1, :, :1]).all()
    assert int((~grid[:, 0, :, 0]).sum()) == round(down * across * sparsity)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unstructurd", "did you mean 'unstructured'"),
        ("4:2", "1 <= N < M"),
        ("0:4", "1 <= N < M"),
        ("4:4", "1 <= N < M"),
        ("2:4@0", "at least one row"),
        ("64:2:4", "write '2:4@64'"),
        ("block:0x4", "at least 1x1"),
        ("", "unknown pattern"),
        ("2:" + "9" * 5000, "unknown pattern"),  # more digits than Python turns into a number
        ("2:4@" + "9" * 5000, "unknown pattern"),
        ("2:4+dense:" + "9" * 5000 + "%", "unknown pattern"),
        (None, "give a string"),
    ],
)
def test_wrong_names(text, message):
    with pytest.raises(ZeroskipError, match=message) as caught:
        Pattern.parse(text)
    assert "\n" not in str(caught.value)


def test_shapes_that_do_not_fit_name_the_layer_and_the_multiple():
    with pytest.raises(ZeroskipError, match=r"mlp\.up: 30 inputs are not a multiple of 4, which 2:4"):
        Pattern.parse("2:4").check((1, 8, 30), "mlp.up")
    with pytest.raises(ZeroskipError, match=r"mlp\.up: 30 outputs are not a multiple of 16"):
        Pattern.parse("block:16x1").check((1, 30, 8), "mlp.up")
    Pattern.parse("2:4@64").check((1, 30, 8), "the last strip may be short")


def test_implied_sparsity():
    assert Pattern.parse("unstructured").sparsity is None
    assert Pattern.parse("8:16@64").sparsity == 0.5
    assert Pattern.parse("3:4").sparsity == 0.25
