"""The demo's sentences, its task, its measurements, and the whole of it on a random encoder."""

import json
import random

import pytest
import torch
from cli_models import WORDS, shorten_races, write_encoder

from zeroskip.demo import data, task
from zeroskip.demo.measure import OURS, _agreeing, batches, model_bytes
from zeroskip.errors import ZeroskipError


@pytest.fixture(scope="module")
def docs():
    """Docstrings of forty modules made of a few words."""
    rng = random.Random(0)

    def words(count):
        return " ".join(rng.choices(WORDS, k=count))

    return [
        data.Docstring(f"module{module:02d}", f"{words(8)} {module} {number}\n\n{words(30)} {number}")
        for module in range(40)
        for number in range(4)
    ]


def test_docstrings_come_from_every_kind_of_definition_in_order_and_once(tmp_path):
    (tmp_path / "b.py").write_text('"""Of b."""\nclass A:\n    """Of A."""\n    async def f(self):\n        "Of f."\n')
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "inner.py").write_text('def g():\n    """Of g."""\ndef h():\n    """Of   b."""\n')
    (tmp_path / "a" / "test").mkdir()
    (tmp_path / "a" / "test" / "t.py").write_text('"""Of a test."""\n')
    (tmp_path / "broken.py").write_text("def (:\n")
    found = data.docstrings(tmp_path)
    assert [(doc.module, doc.text) for doc in found] == [
        ("a", "Of g."),
        ("a", "Of   b."),
        ("b", "Of A."),
        ("b", "Of f."),
    ]


def test_no_docstrings_at_all_is_an_error(tmp_path):
    with pytest.raises(ZeroskipError, match="no docstrings under"):
        data.docstrings(tmp_path)


def test_pairs_keep_the_limits_and_leave_out_second_answers():
    query, rest = "A summary of thirty characters.", "x" * 700
    docs = [
        data.Docstring("m", f"{query}\n\n{rest}"),
        data.Docstring("m", f"{query}\n  \nanother {rest}"),  # the same query
        data.Docstring("m", f"Another summary, long enough.\n\n{rest}"),  # the same document
        data.Docstring("m", f"too short\n\n{rest}"),
        data.Docstring("m", f"{'q' * 201}\n\n{rest}"),
        data.Docstring("m", f"A document that is too short.\n\n{'y' * 80}"),
        data.Docstring("m", f"A document just long enough.\n\n{'z' * 81}"),
    ]
    found = data.pairs(docs)
    assert [pair.query for pair in found] == [query, "A document just long enough."]
    assert found[0].document == "x" * 600


def test_no_module_both_calibrates_and_tests_and_the_seed_decides(docs):
    first, again, other = (data.split(seed, test_pairs=50, texts=20, docs=docs) for seed in (0, 0, 1))
    assert first == again
    assert first.calibration_modules != other.calibration_modules
    assert not set(first.calibration_modules) & set(first.test_modules)
    assert {pair.module for pair in first.pairs} <= set(first.test_modules)
    assert len(first.pairs) == 50 and len(set(first.pairs)) == 50 and len(first.calibration) == 20


def test_too_few_pairs_is_an_error(docs):
    with pytest.raises(ZeroskipError, match="held-out docstring pairs, 1000 asked for"):
        data.split(docs=docs)


def test_the_standard_library_gives_a_thousand_pairs_for_every_seed():
    docs = data.docstrings()
    for seed in range(6):
        split = data.split(seed, docs=docs)
        assert len(split.pairs) == 1000
        assert len(split.calibration) == 2700


def test_no_large_module_decides_what_calibrates():
    docs = [data.Docstring("large", f"Large {i}.") for i in range(90)] + [
        data.Docstring(f"small{j}", f"Small {j} {i}.") for j in range(9) for i in range(10)
    ]
    for seed in range(4):
        split = data.split(seed, test_pairs=0, texts=30, docs=docs)
        most = len(split.calibration_modules)
        assert sum("Large" in text for text in split.calibration) <= -(-30 // most)


class Words(torch.nn.Module):
    """An encoder whose hidden states are the one-hot ids: texts of the same words embed alike."""

    def forward(self, input_ids, attention_mask):
        return (torch.nn.functional.one_hot(input_ids, 40).float(),)


class Tokenizer:
    """Numbers to ids; pads with 39."""

    def __call__(self, texts, padding, truncation, max_length, return_tensors):
        rows = [[int(word) for word in text.split()][:max_length] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [39] * (width - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != 39).long()}


def test_embeddings_mask_padding_have_length_one_and_keep_the_order():
    texts = ["1 1 2", "3", "1 2 2 2 2 2", "4 5 6 7 8"]
    vectors = task.embed(Words(), Tokenizer(), texts, batch_size=3)
    for vector, text in zip(vectors, texts, strict=True):
        counts = torch.zeros(40)
        for word in text.split():
            counts[int(word)] += 1
        torch.testing.assert_close(vector, counts / counts.norm())


def test_recall_on_a_task_with_known_answers():
    pairs = [data.Pair("m", f"{i}", f"{i} {i} 30") for i in range(10)] + [data.Pair("m", "31", "30 30")]
    found = task.recall(Words(), Tokenizer(), pairs)
    assert found.ranks[:10] == (0,) * 10
    assert found.at(1) == 10 / 11
    assert found.ranks[10] == 10  # all its scores are zero: ties count against it


def test_a_model_of_nan_finds_nothing():
    class Broken(Words):
        def forward(self, input_ids, attention_mask):
            return (super().forward(input_ids, attention_mask)[0] * float("nan"),)

    found = task.recall(Broken(), Tokenizer(), [data.Pair("m", f"{i}", f"{i}") for i in range(12)])
    assert found.at(10) == 0


def test_wilson_interval_against_published_values():
    found = task.Recall((0,) * 8 + (5,) * 2)
    low, high = found.interval(1)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)  # 8 of 10
    assert task.Recall((0,) * 10).interval(1)[1] == pytest.approx(1.0)


def test_kept_share_of_the_dense_recall():
    dense, sparse = task.Recall((0,) * 80 + (9,) * 20), task.Recall((0,) * 60 + (9,) * 40)
    value, low, high = sparse.kept(dense, 1)
    assert value == 0.75 and 0.6 < low < 0.75 < high < 0.9
    assert sparse.kept(dense, 10) == (1.0, 1.0, 1.0)


def test_batches_hold_texts_of_all_lengths():
    made = batches(Tokenizer(), [" ".join("1" * n) for n in range(1, 101)], (1, 4), 128)
    assert made[1]["input_ids"].shape == (1, 51)
    assert sorted(made[4]["attention_mask"].sum(1).tolist()) == [13, 38, 63, 88]


def test_a_shared_tensor_is_counted_once():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    assert model_bytes(model) == 128
    model[1].weight = model[0].weight
    assert model_bytes(model) == 64


def test_a_wrong_result_gets_no_time():
    from zeroskip.demo.measure import Speeds

    right = torch.randn(2, 3, 8)
    batch = {"attention_mask": torch.ones(2, 3)}
    entries = {"torch fp32": lambda _: right, "torch bf16": lambda _: -right, OURS: lambda _: right * float("nan")}
    speeds = Speeds()
    kept, once = _agreeing(entries, batch, (right, right), speeds)
    assert list(kept) == list(once) == ["torch fp32"]
    assert set(speeds.missing) == {"torch bf16, batch 2", f"{OURS}, batch 2"}


@pytest.fixture(scope="module")
def demo(docs, tmp_path_factory):
    """The demo, run on a random encoder: (result, directory of the sparse model, phases told)."""
    from zeroskip.demo import run

    place = tmp_path_factory.mktemp("demo")
    told = []
    source = write_encoder(place / "source", hidden=128)
    with pytest.MonkeyPatch.context() as patch:
        shorten_races(patch)
        result = run.run(
            place / "out",
            model=source,
            test_pairs=80,
            texts=16,
            docs=docs,
            speed=False,
            progress=lambda done, total, what: told.append((done, total, what)),
        )
    return result, place / "out", told


def test_the_demo_runs_from_end_to_end(demo):
    result, out, told = demo
    assert told[0] == (0, 8, "collecting docstrings") and told[-1] == (7, 8, "storing")
    assert len(result.dense.ranks) == len(result.sparse.ranks) == 80
    assert abs(result.report.sparsity - 0.5) < 1e-9
    assert {row.pattern for row in result.report.rows} == {"8:16@64"}
    assert "keeps" in result.verdict and "Speed was not measured" in result.verdict
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "source"]
    assert "dense bf16" in str(result) and "recall@10" in str(result)


def test_the_demo_writes_plain_json(demo):
    told = json.loads(json.dumps(demo[0].to_dict(), allow_nan=False))
    assert told["quality"]["sparse"]["queries"] == 80
    assert [size["model"] for size in told["sizes_bytes"]] == ["dense fp32", "dense bf16", "ours, sparse"]
    assert told["recipe"]["calibration_modules"] and told["plan"]["sites"] and told["prune"]["rows"]


def test_the_model_of_the_demo_gives_the_same_embeddings_when_loaded(demo, docs):
    from transformers import AutoTokenizer

    from zeroskip.io import load

    result, out, _ = demo
    again = task.recall(load(out), AutoTokenizer.from_pretrained(out), result.split.pairs)
    assert again.at(10) == pytest.approx(result.sparse.at(10), abs=0.05)  # a tie may fall otherwise, no more


def test_the_demo_replaces_nothing_that_is_not_its_own(tmp_path):
    from zeroskip.demo.run import run

    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ZeroskipError, match="exists and is no model of zeroskip"):
        run(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_speeds_of_a_random_encoder(tmp_path, monkeypatch):
    """Every kind of dense is timed or says why not, ours too, and ratios are to the best dense."""
    import copy

    from transformers import AutoTokenizer

    from zeroskip.compile import compile as compile_model
    from zeroskip.demo import measure
    from zeroskip.io import load

    shorten_races(monkeypatch)
    source = write_encoder(tmp_path)
    dense = load(source)
    inputs = measure.batches(AutoTokenizer.from_pretrained(source), ["return the list", "open a file"] * 4, (2,), 16)
    sparse = compile_model(copy.deepcopy(dense), tokens=(8,))
    found = measure.measure(dense, sparse, dense, "fp32", inputs, compile_models=False, budget_s={2: 0.2})
    kinds = {row.kind for row in found.rows}
    assert {"torch fp32", "our dense fp32", OURS} <= kinds
    assert found.best_dense[2] in kinds - {OURS}
    assert next(row.ratio for row in found.rows if row.kind == found.best_dense[2]) == 1.0
    assert found.ours(2).is_ours and found.ours(2).sentences_per_second > 0


def test_the_faster_kind_of_torch_is_always_compiled():
    from zeroskip.demo.measure import _to_compile

    once = {"torch fp32": 3.0, "torch bf16": 9.0, "oneDNN prepacked fp32": 1.0, "our dense fp32": 2.0}
    once |= {"our dense bf16": 1.5, OURS: 0.5}
    assert set(_to_compile(once, 2.0)) == {"torch fp32", "our dense bf16", OURS}
    assert set(_to_compile(once, 10.0)) == {"torch fp32", "torch bf16", "our dense bf16", OURS}
