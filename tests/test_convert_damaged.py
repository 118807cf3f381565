"""Hostile and damaged files of other tools: one line that names the file, the tensor and the problem, and no output."""

import json

import pytest
import torch
from convert_files import directory, marlin, words
from hypothesis import given, settings
from hypothesis import strategies as st

from zeroskip.convert import convert
from zeroskip.errors import ZeroskipError

BITMASK = {
    "P.shape": torch.tensor([2, 10]),
    "P.compressed": torch.arange(1.0, 8.0),
    "P.bitmask": torch.tensor([[198, 1], [16, 2]], dtype=torch.uint8),
    "P.row_offsets": torch.tensor([0, 5]),
}
TWO = {
    "P.shape": torch.tensor([[2], [8]]),
    "P.compressed": torch.ones(2, 4),
    "P.bitmask": torch.tensor([[198], [99]], dtype=torch.uint8),
}
PACKED = {
    "P.weight_packed": words(torch.full((4, 64), 9), 4),
    "P.weight_scale": torch.ones(4, 2),
    "P.weight_shape": torch.tensor([4, 64]),
}
MARLIN = marlin(torch.tensor([[1, 2, 0, 0] * 8] * 64), torch.ones(64, 1).half(), 4, 32)
NAIVE = {"P.weight": torch.ones(4, 8, dtype=torch.int8), "P.weight_scale": torch.ones(4, 1)}

CASES = [
    (BITMASK, {"P.bitmask": None}, "row_offsets: there is no P.bitmask beside it"),
    (BITMASK, {"P.shape": torch.tensor([2.0, 10.0])}, "P.shape: a shape is a few whole numbers"),
    (BITMASK, {"P.shape": torch.tensor([-2, 10])}, r"P.shape: \[-2, 10\] is not a shape"),
    (BITMASK, {"P.shape": torch.tensor([1 << 40, 10])}, "is not a shape"),
    (BITMASK, {"P.shape": torch.tensor([2, 17])}, "P.bitmask: torch.uint8"),
    (BITMASK, {"P.shape": torch.tensor([2, 9])}, "P.bitmask: has a bit beyond its 9 columns"),
    (BITMASK, {"P.compressed": torch.ones(6)}, "P.compressed: 6 values where the mask has 7 bits"),
    (BITMASK, {"P.compressed": torch.ones(7, 1)}, "P.row_offsets: is not one offset"),
    (BITMASK, {"P.row_offsets": torch.tensor([0, 4])}, "P.row_offsets: does not follow from the mask"),
    (BITMASK, {"P.row_offsets": torch.tensor([0])}, "P.row_offsets: is not one offset for each of 2 rows"),
    (BITMASK, {"P.weight": torch.ones(2, 10)}, "P.bitmask: and P.weight are both there"),
    (TWO, {"P.shape": torch.tensor([2, 8, 1])}, "P.shape: a shape is 2 whole numbers"),
    (TWO, {"P.bitmask": torch.tensor([[198], [231]], dtype=torch.uint8)}, "does not have two bits of every four"),
    (TWO, {"P.compressed": torch.ones(2, 3)}, "P.compressed: torch.float32"),
    (TWO, {"P.compressed": None}, "there is no P.compressed beside it"),
    (PACKED, {"P.weight_shape": torch.tensor([4, 90])}, r"does not hold integers \[4, 90\]"),
    (PACKED, {"P.weight_packed": PACKED["P.weight_packed"].long()}, "P.weight_packed: torch.int64"),
    (PACKED, {"P.weight_scale": torch.ones(3, 2)}, r"scales \[3, 2\] cannot belong to a weight \[4, 64\]"),
    (PACKED, {"P.weight_scale": torch.ones(4, 5)}, "cannot belong"),
    (PACKED, {"P.weight_scale": torch.ones(4, 2, dtype=torch.int32)}, "scales of torch.int32 are not read"),
    (PACKED, {"P.weight_zero_point": torch.ones(2, 2, dtype=torch.int32)}, "P.weight_zero_point: "),
    (PACKED, {"P.weight_g_idx": torch.full((64,), 7)}, "P.weight_g_idx: names group 7 of 2"),
    (PACKED, {"P.weight_g_idx": torch.zeros(3).long()}, "is not a group for each of 64 inputs"),
    (MARLIN, {"P.meta": MARLIN["P.meta"] * 0}, "P.meta: names one of four weights twice"),
    (MARLIN, {"P.scale_packed": torch.ones(1, 32).half()}, "P.weight_packed: no weight is stored as"),
    (MARLIN, {"P.meta": None}, "there is no P.meta beside it"),
    (
        PACKED,
        {"P.weight_packed": torch.ones(4, 10, dtype=torch.int32), "P.weight_shape": torch.tensor([4, 100])},
        "100 inputs of 3 bits fill as many words in either layout",
    ),
    (NAIVE, {"P.weight": torch.ones(4, 8)}, "has scales beside it, but is not int8 or fp8"),
    (NAIVE, {"P.weight_scale": torch.ones(4, 1, 1)}, "cannot belong"),
    (NAIVE, {"P.qweight": torch.ones(1)}, "P.qweight: is left over"),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_what_cannot_be_gets_one_line(tmp_path, case):
    tensors, change, problem = CASES[case]
    changed = {name: value for name, value in {**tensors, **change}.items() if value is not None}
    folder = directory(tmp_path / "a", changed)
    with pytest.raises(ZeroskipError, match=problem) as caught:
        convert(folder, tmp_path / "out")
    assert "\n" not in str(caught.value) and str(folder / "model.safetensors") in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_file_that_holds_no_weights(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ZeroskipError, match=r"empty\.txt: is no weight file: give a directory"):
        convert(tmp_path / "empty.txt", tmp_path / "out")


def test_widths_that_are_not_read_and_other_config(tmp_path):
    weights = {"weights": {"num_bits": 3}}
    for section, problem in (
        ({"config_groups": {"g": weights}}, "holds 4-bit integers where the config says 3"),
        ({"config_groups": ["g"], "quant_method": "awq"}, "is quantised by 'awq'"),
        ("text", "quantization_config is a str"),
    ):
        folder = directory(tmp_path / "a", PACKED, {"quantization_config": section})
        with pytest.raises(ZeroskipError, match=problem):
            convert(folder, tmp_path / "out")
    folder = directory(tmp_path / "a", PACKED, {"quantization_config": {"config_groups": ["g", {"weights": 3}]}})
    convert(folder, tmp_path / "out")
    (folder / "config.json").write_text(json.dumps([]))
    with pytest.raises(ZeroskipError, match=r"config\.json: holds a list"):
        convert(folder, tmp_path / "out2")


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([BITMASK, TWO, PACKED, MARLIN, NAIVE]))
def test_any_change_of_a_byte_is_read_or_refused_in_one_line(tmp_path_factory, data, tensors):
    folder = directory(tmp_path_factory.mktemp("fuzz") / "a", tensors)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.sampled_from([None, place]))
    path.write_bytes(bytes(content)[:cut])
    try:
        convert(folder, folder.with_name("out"))
    except ZeroskipError as error:
        assert "\n" not in str(error) and not folder.with_name("out").exists()
