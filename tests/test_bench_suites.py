"""The suites of the benchmark of kernels: the layers they hold, and where the zeros are."""

import pytest
import torch

from zeroskip.bench import suites
from zeroskip.bench.suites import SUITES, Case
from zeroskip.prune.patterns import Pattern


def test_suites_hold_the_layers_of_the_models():
    shapes = {(case.model, case.m, case.k) for case in SUITES["llm"].cases}
    assert {(m, k) for model, m, k in shapes if model == "Llama-3 8B"} == {
        (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336),
    }  # fmt: skip
    assert {(m, k) for model, m, k in shapes if model == "Llama 1.1B"} == {
        (2048, 2048), (512, 2048), (8192, 2048), (2048, 8192),
    }  # fmt: skip
    parameters = {case.model: case.parameters for name in ("llm", "encoder") for case in SUITES[name].cases}
    assert parameters["Llama-3 8B"] == pytest.approx(6.98e9, rel=1e-3)  # 8.03e9 less embeddings and head
    assert parameters["BERT-base"] == 12 * (4 * 768 * 768 + 2 * 768 * 3072)


@pytest.mark.parametrize("name", SUITES)
def test_suites_begin_with_every_model_under_a_free_and_a_strip_pattern(name):
    cases = SUITES[name].cases
    assert len(set(cases)) == len(cases)
    if name != "synthetic":
        first = cases[: 2 * len({case.model for case in cases})]
        assert {case.model for case in first} == {case.model for case in cases}
        assert {case.zeros.pattern for case in first} == {"unstructured", "8:16@64"}


@pytest.mark.parametrize("zeros", suites.GRID, ids=str)
def test_zeros_are_where_the_pattern_has_them_and_follow_the_activations(zeros):
    case = Case("some", 1152, 192, zeros, 1)
    weight = case.weight()
    assert torch.equal(weight, case.weight()) and torch.equal(weight, weight.bfloat16().float())
    assert (weight == 0).float().mean() == pytest.approx(zeros.sparsity, abs=0.01)
    if zeros.pattern != "unstructured":
        kept = (weight != 0).float()
        again = Pattern.parse(zeros.pattern).select(kept, zeros.sparsity)
        assert torch.equal(again, kept.bool())
    norms = case.norms()
    strong = norms >= norms.sort().values[-20]
    assert (weight[:, strong] != 0).float().mean() > 1.3 * (1 - zeros.sparsity)
    x = case.activations(256)
    assert torch.equal(x, case.activations(256))
    torch.testing.assert_close(x.pow(2).mean(0).sqrt(), norms, rtol=0.3, atol=0)
