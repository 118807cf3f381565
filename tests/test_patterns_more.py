"""Transposable N:M, splits into a dense and an N:M part, and scopes: counts, best choices, and what methods do."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import error, layer, problem
from tiny_models import batches, llama

from zeroskip.errors import ZeroskipError
from zeroskip.prune import Method, Pattern, prune
from zeroskip.prune.composition import Composition
from zeroskip.prune.patterns.transposable import best_regular

WANTS = {name: kind for name, kind in Method.known.items() if kind.chooses and not kind.surveys}
PATTERNS = [
    "unstructured:row",
    "unstructured:tensor",
    "unstructured:columns12",
    "block:1x4",
    "block:4x1",
    "2:4t",
    "4:8t",
    "2:4+dense:25%",
    "1:4+dense:50%rows",
    "2:8@4+dense:50%",
    "2:4@8+dense:25%rows",
]


def drawn(shape, levels, seed):
    return torch.randint(levels, shape, generator=torch.Generator().manual_seed(seed)).float()


def best_sum(score, kept):
    """The largest sum of a choice of `kept` in every row and column, by trying all rows after one another."""
    of = len(score)
    reached = {(0,) * of: 0.0}
    for row in score.tolist():
        following = {}
        for used, total in reached.items():
            for chosen in itertools.combinations(range(of), kept):
                now = tuple(u + (c in chosen) for c, u in enumerate(used))
                if max(now) <= kept:
                    worth = total + sum(row[c] for c in chosen)
                    following[now] = max(following.get(now, -1e30), worth)
        reached = following
    return reached[(kept,) * of]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 6).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))),
    st.sampled_from([2, 5, 1000]),
    st.integers(0, 999),
)
def test_transposable_is_the_best_of_all_choices(nm, levels, seed):
    kept, of = nm
    score = drawn((3, of, of), levels, seed)
    score[0] *= 1e-12  # the size of one block must not hide what another gains
    keep = best_regular(score, kept)
    assert (keep.sum(1) == kept).all() and (keep.sum(2) == kept).all()
    for block, on in zip(score, keep, strict=True):
        assert float(block[on].sum(dtype=torch.float64)) == pytest.approx(best_sum(block, kept), rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([5, 8, 16]), st.integers(1, 4), st.floats(0, 12), st.integers(0, 99))
def test_transposable_counts_hold_for_scores_of_any_spread(of, kept, spread, seed):
    """Many cycles then gain next to nothing, and none of them may be cut short."""
    draw = torch.Generator().manual_seed(seed)
    score = (spread * torch.randn(20, of, of, generator=draw)).exp()
    keep = best_regular(score, kept)
    assert (keep.sum(1) == kept).all() and (keep.sum(2) == kept).all()


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(["8:16t", "12:16t", "3:32t", "16:32t"]), st.integers(0, 99), st.booleans())
def test_transposable_of_many_is_no_worse_than_any_swap_or_turn(name, seed, transposed):
    pattern = Pattern.parse(name)
    score = torch.rand(pattern.of, 2 * pattern.of, generator=torch.Generator().manual_seed(seed))
    keep = pattern.select(score, 0.0)
    back = pattern.select(score.view(pattern.of, 2, -1).transpose(1, 2).reshape(-1, pattern.of).t(), 0.0)
    assert (keep.view(pattern.of, 2, pattern.of).sum(2) == pattern.kept).all()
    assert (keep.sum(0) == pattern.kept).all() and back.shape == (pattern.of, 2 * pattern.of)
    first, on = score[:, : pattern.of], keep[:, : pattern.of]
    mirrored = best_regular(first.t().contiguous().unsqueeze(0), pattern.kept)[0].t()
    assert float(first[mirrored].sum()) == pytest.approx(float(first[on].sum()), rel=1e-5)
    price = torch.where(on, -first, torch.inf).unsqueeze(1) + torch.where(on, torch.inf, first).unsqueeze(0)
    # two rows exchange a column each: i gives c to j and takes d from it
    pair = torch.where(on, -first, -torch.inf).unsqueeze(1) + torch.where(on, -torch.inf, first).unsqueeze(0)
    gain = pair.amax(2)
    assert price.shape == pair.shape and float((gain + gain.t()).max()) <= 1e-4


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["2:4", "1:4", "5:8", "2:4@3", "8:16@4"]),
    st.sampled_from(["25%", "50%", "12.5%", "25%rows", "50%rows"]),
    st.integers(0, 99),
)
def test_split_leaves_dense_what_would_lose_most(nm, part, seed):
    rest, pattern = Pattern.parse(nm), Pattern.parse(f"{nm}+dense:{part}")
    rows, columns = 8 * rest.strip, 8 * rest.of
    pattern.check((1, rows, columns), "layer")
    score = drawn((rows, columns), 7, seed)
    keep, inner = pattern.select(score, pattern.sparsity), rest.select(score, 0.0)
    assert int((~keep).sum()) == round(pattern.sparsity * keep.numel())
    lost = score.masked_fill(inner, 0.0)
    if part.endswith("rows"):
        sums, whole = lost.view(8, -1).sum(1), keep.view(8, -1).all(1)
    else:
        sums, whole = lost.sum(0).view(8, -1).sum(1), keep.view(rows, 8, -1).all(2).all(0)
    want = round(8 * float(part.removesuffix("rows").removesuffix("%")) / 100)
    best = sorted(range(8), key=lambda unit: (-float(sums[unit]), unit))[:want]
    assert whole.nonzero().flatten().tolist() == sorted(best)
    region = pattern.dense(score)
    assert torch.equal(keep[~region], inner[~region]) and int(region.sum()) * 8 == want * keep.numel()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 30), st.integers(1, 50), st.integers(1, 60), st.floats(0, 0.999), st.integers(0, 99), st.booleans()
)
def test_scopes_count_exactly_whatever_the_method_prefers(rows, columns, width, sparsity, seed, by_row):
    score, prefers = drawn((rows, columns), 4, seed), "row" if by_row else "tensor"
    drop = round(rows * columns * sparsity)
    zeros = {
        name: ~Pattern.parse(f"unstructured:{name}").select(score, sparsity, prefers)
        for name in ("row", "tensor", f"columns{width}")
    }
    assert all(int(each.sum()) == drop for each in zeros.values())
    by_rows = zeros["row"].sum(1)
    assert int(by_rows.max() - by_rows.min()) <= 1
    whole = zeros["tensor"]
    assert not whole.any() or whole.all() or float(score[whole].max()) <= float(score[~whole].min())
    for start in range(0, columns, width):
        part = zeros[f"columns{width}"][:, start : start + width]
        assert abs(int(part.sum()) - drop * part.shape[1] / columns) <= 1
        inside = score[:, start : start + width]
        assert not part.any() or part.all() or float(inside[part].max()) <= float(inside[~part].min())


@pytest.mark.parametrize(
    ("method", "pattern"), [(m, p) for m in WANTS for p in PATTERNS if Method.known[m]().serves(Pattern.parse(p))]
)
@settings(max_examples=2, deadline=None)
@given(st.integers(0, 99), st.sampled_from([0.37, 0.5]))
def test_every_method_keeps_pattern_and_count(method, pattern, seed, sparsity):
    w, x = layer(seed, 32, 48)
    task = problem(w, x, pattern, sparsity, tokens=len(x))
    first, last = Composition.parse(f"{method}+ls").run(task)
    unit = 4 if pattern.startswith("block") else 1
    assert int((~first.keep).sum()) == unit * round(w.numel() / unit * task.sparsity)
    assert torch.equal(task.pattern.select(first.keep.float(), task.sparsity), first.keep)
    assert torch.equal(first.keep, last.keep)
    for solution in (first, last):
        assert (solution.weight[~first.keep] == 0).all() and torch.isfinite(solution.weight).all()
    assert error(w, last.weight, x) < 1


def test_who_does_not_serve_what_says_so():
    refused = {
        "obs": ["2:4t", "unstructured:tensor", "unstructured:columns128", "block:1x4"],
        "sparsegpt": ["unstructured:row", "unstructured:tensor"],
        "sparsegpt+gptq": ["unstructured:row"],
        "dsnot": ["2:4t", "2:4@8+dense:25%"],
        "fista": ["2:4@8+dense:25%", "block:1x4"],
        "gptq": ["unstructured:row", "2:4t"],
        "rtn": ["unstructured:row"],
    }
    model = llama(layers=1)
    for method, patterns in refused.items():
        for pattern in patterns:
            given = {} if Method.known[method].chooses and not pattern.startswith(("u", "b")) else {"sparsity": 0.5}
            with pytest.raises(ZeroskipError, match=rf"{method.replace('+', '.')}.* cannot serve pattern"):
                prune(model, method, pattern=pattern, calibration=batches("llama", 1), **given)


def test_obs_beside_a_dense_part_is_obs_on_the_rest():
    w, x = layer(4, 32, 48)
    whole = problem(w, x, "2:4@8")
    rows = problem(w, x, "2:4@8+dense:25%rows")
    solution = Composition.parse("obs").run(rows)[0]
    dense = solution.keep.all(1)
    plain = Composition.parse("obs").run(whole)[0]
    assert int(dense.sum()) == 8 and torch.equal(solution.keep[~dense], plain.keep[~dense])
    torch.testing.assert_close(solution.weight[~dense], plain.weight[~dense])
    torch.testing.assert_close(solution.weight[dense], w[dense])
    columns = Composition.parse("obs").run(problem(w, x, "2:4@8+dense:25%"))[0]
    assert int(columns.keep.view(32, 12, 4).all(2).all(0).sum()) == 3
    assert error(w, columns.weight, x) < error(w, plain.weight, x)


@pytest.mark.parametrize(
    ("pattern", "shape", "message"),
    [
        ("2:4t", (1, 30, 32), r"mlp\.up: 30 outputs are not a multiple of 4, which 2:4t needs"),
        ("4:8t", (1, 32, 36), r"mlp\.up: 36 inputs are not a multiple of 8, which 4:8t needs"),
        ("2:4+dense:25%", (1, 8, 30), r"mlp\.up: 30 inputs are not a multiple of 4"),
        ("2:4+dense:25%", (1, 8, 40), r"mlp\.up: 25 % of 40 inputs are 10, not a multiple of 4"),
        ("2:4+dense:12.5%rows", (1, 12, 40), r"mlp\.up: 12\.5 % of 12 outputs are 1\.5, not a multiple of 1"),
        ("2:4@8+dense:25%rows", (1, 30, 40), r"mlp\.up: 30 outputs are not a multiple of 8"),
    ],
)
def test_shapes_that_do_not_fit(pattern, shape, message):
    with pytest.raises(ZeroskipError, match=message) as caught:
        Pattern.parse(pattern).check(shape, "mlp.up")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4:4t", "1 <= N < M"),
        ("2:4t@16", "not transposable"),
        ("32:64t", "up to M = 32"),
        ("2:4T", "did you mean '2:4'"),
        ("2:4+dense:0%", "more than 0 %"),
        ("2:4+dense:100%", "more than 0 %"),
        ("2:4+dense:1/4", "did you mean '2:4.dense:25%'"),
        ("4:2+dense:25%", "1 <= N < M"),
        ("unstructured:columns", "how many inputs"),
        ("unstructured:columns0", "how many inputs"),
        ("unstructured:row3", "did you mean 'unstructured:row'"),
    ],
)
def test_wrong_names(text, message):
    with pytest.raises(ZeroskipError, match=message) as caught:
        Pattern.parse(text)
    assert "\n" not in str(caught.value)


def test_budgets_step_through_transposable_and_refuse_a_split():
    model = llama()
    report = prune(model, "magnitude", pattern="2:4t", budget="global", sparsity=0.5)
    names = {row.pattern for row in report.rows}
    assert names <= {"1:4t", "2:4t", "3:4t"} and len(names) > 1
    for row in report.rows:
        on = (model.get_submodule(row.name).weight != 0).view(row.shape[1] // 4, 4, -1, 4)
        kept = Pattern.parse(row.pattern).kept
        assert (on.sum(1) == kept).all() and (on.sum(3) == kept).all()
    with pytest.raises(ZeroskipError, match=r"budget cannot change 2:4\+dense:25%"):
        prune(llama(), "magnitude", pattern="2:4+dense:25%", budget="erk")
