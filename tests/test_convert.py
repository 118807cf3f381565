"""Formats of other tools: golden vectors, round trips, and models that plain transformers loads."""

import json
from pathlib import Path

import pytest
import torch
from cli_models import cli, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import batches, llama

import zeroskip
from zeroskip.convert import convert, writable
from zeroskip.convert.integers import unpack_words, words_for
from zeroskip.io.scales import FILE
from zeroskip.model import find_sites
from zeroskip.planning.candidates import pack_as
from zeroskip.planning.install import put_in

SPARSE = [[0, 1, 2, 0, 0, 0, 3, 4, 5, 0], [0, 0, 0, 0, 6, 0, 0, 0, 0, 7]]
TWO_OF_FOUR = [[0, 1, 2, 0, 0, 0, 3, 4], [9, 0, 0, 0, 0, 8, 7, 0]]


def directory(folder: Path, tensors, config=None) -> Path:
    """A directory with these tensors and this config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def converted(folder: Path, to="dense", **given):
    """Convert it; return the tensors that come out."""
    out = folder.with_name(f"{folder.name}-{to}")
    convert(folder, out, to, **given)
    return load_file(out / "model.safetensors")


def bits_alike(one, other):
    """Whether two tensors are of one type and shape, to the bit (so that +0.0 is not -0.0)."""
    same = one.dtype == other.dtype and one.shape == other.shape
    return same and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


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


def words(codes, bits, stream=True):
    """[rows, columns] of non-negative numbers in 32-bit words, the first lowest, one number at a time."""
    rows = []
    for row in codes.tolist():
        if not stream:  # each code whole in its word
            some = 32 // bits
            row = [sum(c << (bits * i) for i, c in enumerate(row[j : j + some])) for j in range(0, len(row), some)]
            rows.append([value - (1 << 32) if value >> 31 else value for value in row])
            continue
        whole = sum(value << (bits * place) for place, value in enumerate(row))
        count = -(-len(row) * bits // 32)
        values = [(whole >> (32 * word)) & 0xFFFFFFFF for word in range(count)]
        rows.append([value - (1 << 32) if value >> 31 else value for value in values])
    return torch.tensor(rows, dtype=torch.int32)


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


def marlin(codes, scale, bits, group):
    """What compressed-tensors makes of the codes [out, in] of a 2:4 weight, step by step as its format is described."""
    rows, columns = codes.shape
    kept = torch.zeros(rows, columns // 2, dtype=torch.long)
    meta = torch.zeros(rows, columns // 16, dtype=torch.long)
    for row in range(rows):
        for four in range(columns // 4):
            places = [p for p in range(4) if codes[row, 4 * four + p]]
            places = sorted((places + [p for p in (3, 2, 1, 0) if p not in places])[:2])
            kept[row, 2 * four : 2 * four + 2] = codes[row, [4 * four + p for p in places]]
            meta[row, four // 4] |= (places[0] | places[1] << 2) << (4 * (four % 4))
    # CUTLASS: rows of a block of 64 dealt out, 2 x 2 corners swapped, pairs of columns column-major
    mixed = torch.zeros(rows * (columns // 16), dtype=torch.long)
    for row in range(rows):
        for column in range(columns // 16):
            r = row // 64 * 64 + row % 2 * 2 + row % 8 // 4 + row % 4 // 2 * 32 + row % 64 // 8 * 4
            c = column
            if (r % 2, c % 2) == (0, 1):
                r, c = r + 1, c - 1
            elif (r % 2, c % 2) == (1, 0):
                r, c = r - 1, c + 1
            mixed[c // 2 * rows * 2 + r * 2 + c % 2] = meta[row, column]
    tiles = (kept.t() + (1 << (bits - 1))).reshape(columns // 32, 16, rows // 16, 16).permute(0, 2, 1, 3)
    interleave = [0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else [0, 2, 1, 3]
    order = []
    for lane in range(32):
        column = lane // 4
        for tile in range(4):
            for block in (0, 1):
                for row in (2 * (lane % 4), 2 * (lane % 4) + 1, 2 * (lane % 4 + 4), 2 * (lane % 4 + 4) + 1):
                    order.append(16 * row + column // 2 * 256 + 8 * (column % 2) + 4 * block + tile)
    order = torch.tensor(order).view(-1, len(interleave))[:, interleave].reshape(-1)
    packed = words(tiles.reshape(-1, 1024)[:, order].reshape(columns // 32, -1), bits)
    scales = scale.t()
    if group < columns // 2:
        deal = [8 * run + place for run in range(8) for place in (0, 4, 1, 5, 2, 6, 3, 7)]
        scales = scales.reshape(-1, 64)[:, deal].reshape(scales.shape)
    meta = torch.where(mixed >= 1 << 15, mixed - (1 << 16), mixed).to(torch.int16)
    return {"P.weight_packed": packed, "P.scale_packed": scales, "P.meta": meta.view(columns // 32, 2 * rows)}


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


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """The directory of a small Llama that was pruned 2:4 and rounded to int4, and the model."""
    model = llama(torch.bfloat16, layers=1)
    zeroskip.prune(
        model, "sparsegpt+gptq", pattern="2:4", calibration=batches("llama", 1), values="int4", group_size=32
    )
    folder = tmp_path_factory.mktemp("rounded") / "model"
    zeroskip.save(model, folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder, model


@pytest.mark.parametrize("to", writable())
def test_a_model_goes_out_and_comes_back(rounded, tmp_path, to):
    from transformers import LlamaForCausalLM

    folder, model = rounded
    out = cli("convert", folder, tmp_path / "there", "--to", to, "--json", tmp_path / "there.json")
    assert out.exit_code == 0, out.output
    assert "sparsity_config" not in (tmp_path / "there" / "config.json").read_text()
    done = json.loads((tmp_path / "there.json").read_text())
    assert done["to"] == to and (to == "dense" or (done["written"] == 7 and done["bytes_after"] < done["bytes_before"]))
    convert(tmp_path / "there", tmp_path / "back")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "back")
    want = model.state_dict()
    assert all(bits_alike(value, want[name]) for name, value in loaded.state_dict().items())
    assert (tmp_path / "back" / "tokenizer.json").exists() and (tmp_path / "back" / "generation_config.json").exists()
    for before, after in zip(find_sites(model), find_sites(zeroskip.load(tmp_path / "back")), strict=True):
        assert torch.equal(after.scales, before.scales)


def test_transformers_does_not_make_up_the_weights_of_a_bitmask_model(rounded, tmp_path):
    from transformers import LlamaForCausalLM

    convert(rounded[0], tmp_path / "out", "sparse-bitmask")
    with pytest.raises((ImportError, ValueError)):  # it asks for compressed-tensors
        LlamaForCausalLM.from_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    convert(rounded[0], tmp_path / "old", "sparse-bitmask", sparsity_config=True)
    section = json.loads((tmp_path / "old" / "config.json").read_text())["quantization_config"]["sparsity_config"]
    assert config["quantization_config"] == {"quant_method": "compressed-tensors"}
    assert section["format"] == "sparse-bitmask" and "model.layers.0.mlp.up_proj" in section["targets"]


def test_a_compiled_model_becomes_ordinary_again(rounded, tmp_path):
    from transformers import LlamaForCausalLM

    model = zeroskip.load(rounded[0])
    for site in find_sites(model)[:3]:
        packed = pack_as("bitmask", site.weight()[0], "int4", site.scales)
        put_in(model, site.module, zeroskip.nn.PackedLinear.from_packed(packed, None))
    zeroskip.save(model, tmp_path / "compiled")
    done = convert(tmp_path / "compiled", tmp_path / "out")
    assert done.found == {"zeroskip": 3} and done.scales == 7
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, rounded[1].state_dict()[name]) for name, value in loaded.state_dict().items())


def test_our_packed_directory_holds_the_codes_and_the_rest_is_dense(rounded, tmp_path):
    done = convert(rounded[0], tmp_path / "out", "zeroskip")
    model = zeroskip.load(tmp_path / "out")
    for site in find_sites(rounded[1]):
        packed = model.get_submodule(site.name).packed
        assert packed.values == "int4" and packed.group_size == 32
        assert torch.equal(zeroskip.unpack(packed).to(torch.bfloat16), site.weight()[0])
    assert done.written == len(find_sites(rounded[1])) and done.to == "zeroskip"
    ids = torch.arange(12).view(1, -1)
    with torch.inference_mode():
        want, got = rounded[1](ids).logits.float(), model(ids).logits.float()
    assert float((got - want).abs().max()) <= 0.05 * float(want.abs().max())
    assert any("tied" in note for note in done.notes)


def test_shards(rounded, tmp_path):
    convert(rounded[0], tmp_path / "out", "sparse-24-bitmask", max_shard_bytes=4000)
    convert(tmp_path / "out", tmp_path / "back")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    got, want = load_file(tmp_path / "back" / "model.safetensors"), rounded[1].state_dict()
    assert all(torch.equal(value, want[name]) for name, value in got.items())


def test_refusals(rounded, tmp_path):
    folder = rounded[0]
    assert "unknown format 'sparse_bitmask' (did you mean 'sparse-bitmask'?)" in refused(
        "convert", folder, tmp_path / "out", "--to", "sparse_bitmask"
    )
    assert "leave them out" in refused("convert", folder, tmp_path / "out", "--old-names")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    assert "not an empty directory" in refused("convert", folder, tmp_path / "full")
    assert "no such directory or file" in refused("convert", tmp_path / "none", tmp_path / "out")
    empty = directory(tmp_path / "gptq", {"a": torch.ones(1)}, {"quantization_config": {"quant_method": "gptq"}})
    assert "is quantised by 'gptq'" in refused("convert", empty, tmp_path / "out")
    random = directory(tmp_path / "random", {"p.weight": torch.ones(4, 8)})
    assert "no weight is 2:4" in refused("convert", random, tmp_path / "out", "--to", "sparse-24-bitmask")
    assert "leave them out with 'zeroskip'" in refused(
        "convert", folder, tmp_path / "out", "--to", "zeroskip", "--old-names"
    )
    assert "names no architecture" in refused("convert", random, tmp_path / "out", "--to", "zeroskip")
    assert not (tmp_path / "out").exists()
