"""Packed integers of compressed-tensors, in groups and as Marlin 2:4: words by hand, and the codes that come out."""

import pytest
import torch
from convert_files import bits_alike, converted, directory, marlin, words
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import zeroskip
from zeroskip.convert import convert
from zeroskip.convert.integers import unpack_words, words_for
from zeroskip.io.scales import FILE


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 999),
    st.one_of(
        st.tuples(st.sampled_from([4, 8]), st.sampled_from([(3, 70, 32), (2, 256, 128), (5, 33, None)])),
        st.tuples(st.sampled_from([3, 5, 6, 7]), st.sampled_from([(3, 160, 32), (2, 256, 128), (5, 201, None)])),
    ),
    st.booleans(),
    st.booleans(),
)
def test_packed_integers_are_read_and_packed_again(tmp_path_factory, seed, kind, symmetric, stream):
    bits, (rows, columns, group) = kind
    draw = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    groups = 1 if group is None else -(-columns // group)
    codes = torch.randint(-half, half, (rows, columns), generator=draw)
    scale = (torch.rand(rows, groups, generator=draw) + 0.5).half()
    zero = torch.randint(-3 if symmetric else -half, 4 if symmetric else half, (rows, groups), generator=draw)
    place = torch.arange(columns) // (group or columns)
    tensors = {
        "P.weight_packed": words(codes + half, bits, stream),
        "P.weight_scale": scale,
        "P.weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        tensors["P.weight_zero_point"] = words((zero + half).t(), bits, stream).t()
        codes = codes - zero[:, place]
    weights = {"num_bits": bits, "group_size": group, "symmetric": symmetric}
    section = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
    folder = directory(tmp_path_factory.mktemp("packed") / "a", tensors, {"quantization_config": section})
    got = converted(folder)["P.weight"]
    assert bits_alike(got, (codes.half() * scale[:, place]) + 0.0)
    kept = load_file(folder.with_name("a-dense") / FILE)["P"][0]
    size = group or 128
    if codes.min() >= -128 and codes.max() <= 127:
        packed = zeroskip.pack(got.float(), "dense", values="int8", group_size=size, scales=kept)
        assert torch.equal(packed.codes.long(), codes)
    if bits in (3, 4) and symmetric:
        assert torch.equal(zeroskip.pack(got.float(), "bitmask", "int4", size, kept).codes.long(), codes)


def test_golden_words_of_three_bits():
    """Twelve codes, each an octal digit: ten whole ones to a word, or one stream of 36 bits."""
    codes = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    whole, stream = [0o1076543210, 0o32], [0o321076543210 & 0xFFFFFFFF, 0o321076543210 >> 32]
    assert whole == [150652552, 26] and stream == [2298136200, 6]
    for words_, kind in ((whole, False), (stream, True)):
        packed = torch.tensor([words_]).to(torch.uint32).view(torch.int32)
        assert unpack_words(packed, 3, kind)[0, :12].tolist() == codes
        assert words_for(12, 3, kind) == 2
    assert [words_for(160, bits, False) for bits in (3, 5, 6, 7)] == [16, 27, 32, 40]
    assert [words_for(160, bits, True) for bits in (3, 5, 6, 7)] == [15, 25, 30, 35]


def test_groups_in_another_order(tmp_path):
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (4, 64), generator=draw)
    order = torch.randint(0, 2, (64,), generator=draw)
    scale = torch.rand(4, 2, generator=draw) + 0.5
    tensors = {
        "P.weight_packed": words(codes + 8, 4),
        "P.weight_scale": scale,
        "P.weight_shape": torch.tensor([4, 64]),
        "P.weight_g_idx": order.int(),
    }
    folder = directory(tmp_path / "a", tensors)
    done = convert(folder, tmp_path / "b")
    assert torch.equal(load_file(tmp_path / "b" / "model.safetensors")["P.weight"], codes * scale[:, order])
    assert done.scales == 0 and "not of neighbours" in done.notes[0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("columns", "group"), [(128, 32), (128, 64), (64, 64)])
def test_marlin_24_is_read(tmp_path, bits, columns, group):
    draw = torch.Generator().manual_seed(bits + columns)
    half = 1 << (bits - 1)
    order = torch.rand(128, columns // 4, 4, generator=draw).argsort(2).view(128, columns)
    codes = torch.randint(-half, half, (128, columns), generator=draw).masked_fill(order < 2, 0)
    scale = (torch.rand(128, columns // group, generator=draw) + 0.5).half()
    folder = directory(tmp_path / "a", marlin(codes, scale, bits, group))
    got = converted(folder)["P.weight"]
    assert bits_alike(got, codes.half() * scale.repeat_interleave(group, 1) + 0.0)
    kept = load_file(tmp_path / "a-dense" / FILE)["P"][0]
    assert torch.equal(zeroskip.pack(got.float(), "dense", f"int{bits}", group, kept).codes.long(), codes)


GOLDEN = {"weight_packed": [912397633, 828643139, 1360279395, 1393963621], "meta": [-25468, -25468, -31507, -31507]}


def test_a_word_of_marlin_24_as_compressed_tensors_writes_it(tmp_path):
    """The first words of a 64 x 32 weight whose code in row r, column c is (r + c) % 7 - 7 where it is kept."""
    row, column = torch.arange(64).view(-1, 1), torch.arange(32)
    pairs = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]])
    keep = pairs[(3 * row + torch.arange(8)) % 6].view(64, 32) == 1
    codes = torch.where(keep, (row + column) % 7 - 7, 0)
    made = marlin(codes, torch.ones(64, 1).half(), 4, 32)
    assert made["P.weight_packed"].shape == (1, 128) and made["P.meta"].shape == (1, 128)
    assert made["P.weight_packed"][0, :4].tolist() == GOLDEN["weight_packed"]
    assert made["P.meta"][0, :4].tolist() == GOLDEN["meta"]
    assert torch.equal(converted(directory(tmp_path / "a", made))["P.weight"].long(), codes)
