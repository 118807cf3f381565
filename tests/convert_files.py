"""Directories in the formats of other tools, written step by step as those are described, for the tests."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from zeroskip.convert import convert


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
