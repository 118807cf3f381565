"""The two bitmask formats of compressed-tensors: golden vectors of both eras, and round trips."""

import json

import pytest
import torch
from convert_files import bits_alike, converted, directory
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from zeroskip.convert import convert
from zeroskip.io.scales import FILE

SPARSE = [[0, 1, 2, 0, 0, 0, 3, 4, 5, 0], [0, 0, 0, 0, 6, 0, 0, 0, 0, 7]]
TWO_OF_FOUR = [[0, 1, 2, 0, 0, 0, 3, 4], [9, 0, 0, 0, 0, 8, 7, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_golden_vectors_of_the_bitmask_formats(tmp_path, dtype):
    weight = torch.zeros(2, 64, dtype=dtype)  # wide enough to gain
    weight[:, :10] = torch.tensor(SPARSE)
    got = converted(directory(tmp_path / "a", {"p.weight": weight, "norm.weight": torch.ones(3)}), "sparse-bitmask")
    assert sorted(got) == ["norm.weight", "p.bitmask", "p.compressed", "p.row_offsets", "p.shape"]
    assert got["p.bitmask"][:, :2].tolist() == [[198, 1], [16, 2]] and got["p.bitmask"].dtype == torch.uint8
    assert got["p.compressed"].tolist() == [1, 2, 3, 4, 5, 6, 7] and got["p.compressed"].dtype == dtype
    assert got["p.row_offsets"].tolist() == [0, 5] and got["p.shape"].tolist() == [2, 64]
    assert got["p.row_offsets"].dtype == got["p.shape"].dtype == torch.int64

    two = directory(tmp_path / "b", {"p.weight": torch.tensor(TWO_OF_FOUR, dtype=dtype)})
    got = converted(two, "sparse-24-bitmask")
    assert sorted(got) == ["p.bitmask", "p.compressed", "p.shape"] and got["p.shape"].tolist() == [[2], [8]]
    assert got["p.bitmask"].tolist() == [[198], [99]]
    assert got["p.compressed"].tolist() == [[1, 2, 3, 4], [9, 0, 8, 7]]


@pytest.mark.parametrize("era", ["P", "P.weight"])
def test_golden_files_of_both_eras_are_read(tmp_path, era):
    tensors = {
        f"{era}.shape": torch.tensor([2, 10]),
        f"{era}.compressed": torch.arange(1.0, 8.0),
        f"{era}.bitmask": torch.tensor([[198, 1], [16, 2]], dtype=torch.uint8),
        f"{era}.row_offsets": torch.tensor([0, 5]),
    }
    section = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse_bitmask"}}
    for key in ("quantization_config", "compression_config"):
        got = converted(directory(tmp_path / key, tensors, {key: section, "model_type": "llama"}))
        assert list(got) == ["P.weight"] and got["P.weight"].tolist() == SPARSE
        assert json.loads((tmp_path / f"{key}-dense" / "config.json").read_text()) == {"model_type": "llama"}
    tensors = {
        f"{era}.shape": torch.tensor([[2], [8]]),
        f"{era}.compressed": torch.tensor([[1, 2, 3, 4], [9, 0, 8, 7]], dtype=torch.float16),
        f"{era}.bitmask": torch.tensor([[198], [99]], dtype=torch.uint8),
    }
    got = converted(directory(tmp_path / "two", tensors))
    assert got["P.weight"].tolist() == TWO_OF_FOUR and got["P.weight"].dtype == torch.float16


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 999),
    st.sampled_from([(1, 1), (3, 7), (5, 8), (4, 65), (2, 3, 9)]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8]),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_old_names_hold_any_tensor(tmp_path_factory, seed, shape, dtype, zeros):
    draw = torch.Generator().manual_seed(seed)
    value = torch.randn(shape, generator=draw) * 4
    value = torch.where(torch.rand(shape, generator=draw) < zeros, 0.0, value).to(dtype)
    given = {"p.weight": value, "p.bias": torch.randn(5, generator=draw), "scale": torch.tensor(2.0)}
    folder = directory(tmp_path_factory.mktemp("any") / "a", given)
    convert(folder, folder.with_name("b"), "sparse-bitmask", old_names=True)
    stored = load_file(folder.with_name("b") / "model.safetensors")
    assert {"p.weight.bitmask", "p.bias.compressed", "scale"} <= stored.keys() and "p.weight" not in stored
    got = converted(folder.with_name("b"))
    assert got.keys() == given.keys() and all(torch.equal(got[name].float(), given[name].float()) for name in given)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(1, 4), st.sampled_from([4, 8, 12, 64]), st.integers(0, 2))
def test_two_of_four_comes_back(tmp_path_factory, seed, rows, columns, kept):
    draw = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, columns // 4, 4, generator=draw).argsort(2).view(rows, columns)
    weight = torch.where(order < kept, torch.randn(rows, columns, generator=draw), 0.0)
    for old in (False, True):
        folder = directory(tmp_path_factory.mktemp("two") / "a", {"p.weight": weight})
        convert(folder, folder.with_name("b"), "sparse-24-bitmask", old_names=old)
        assert bits_alike(converted(folder.with_name("b"))["p.weight"], weight)


def test_bitmask_over_scaled_codes(tmp_path):
    tensors = {
        "P.shape": torch.tensor([[2], [8]]),
        "P.compressed": torch.tensor([[1, 2, 3, 4], [9, 0, -8, 7]], dtype=torch.int8),
        "P.bitmask": torch.tensor([[198], [99]], dtype=torch.uint8),
        "P.weight_scale": torch.tensor([[0.5], [0.25]]),
        "P.input_scale": torch.tensor(3.0),
    }
    got = converted(directory(tmp_path / "a", tensors, {"quantization_config": {"quant_method": "compressed-tensors"}}))
    signed = torch.tensor(TWO_OF_FOUR)
    signed[1, 5] = -8
    assert list(got) == ["P.weight"] and torch.equal(got["P.weight"], signed * torch.tensor([[0.5], [0.25]]))
    assert load_file(tmp_path / "a-dense" / FILE)["P"].tolist() == [[[0.5], [0.25]]]
    tensors = {"P.weight": torch.tensor([[1.5, -0.0, 448.0]]).to(torch.float8_e4m3fn), "P.weight_scale": torch.ones(1)}
    got = converted(directory(tmp_path / "b", tensors))
    assert bits_alike(got["P.weight"], torch.tensor([[1.5, 0.0, 448.0]]))
    assert not (tmp_path / "b-dense" / FILE).exists()
