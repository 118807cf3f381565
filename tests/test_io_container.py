"""The safetensors container: what we write others read, and nothing that is read is believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeroskip.errors import ZeroskipError
from zeroskip.io.container import DTYPES, Later, order, read_header, write


def test_every_dtype_and_shape_is_read_by_the_library(tmp_path: Path) -> None:
    tensors = {}
    for name, dtype in DTYPES.items():
        if name in ("U16", "U32", "U64"):
            tensors[name] = torch.arange(12, dtype=torch.int64).to(dtype).reshape(3, 4)
        else:
            tensors[name] = (torch.arange(12) - 3).abs().to(dtype).reshape(3, 4)
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 7), "turned": torch.arange(6.0).reshape(2, 3).t()}
    tensors |= {"später": Later(torch.float32, (2, 2), lambda: torch.ones(2, 2))}
    path = tmp_path / "a.safetensors"
    write(path, {name: tensors[name] for name in order(tensors, [])}, {"format": "pt"})
    entries = read_header(path)
    with safetensors.safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(tensors) == set(entries)
        for name, tensor in tensors.items():
            expected = torch.ones(2, 2) if isinstance(tensor, Later) else tensor
            found = file.get_tensor(name)
            assert found.dtype == expected.dtype and found.shape == expected.shape, name
            assert (
                found.contiguous()
                .reshape(-1)
                .view(torch.uint8)
                .equal(expected.contiguous().reshape(-1).view(torch.uint8))
            ), name
            assert entries[name].begin % expected.dtype.itemsize == 0, "a tensor must be aligned for its own dtype"


def test_data_starts_on_a_page_and_blobs_on_64_bytes(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.zeros(3),
        "blob.b": torch.zeros(192, dtype=torch.int8),
        "round": torch.zeros(16),
        "blob.a": torch.zeros(64, dtype=torch.int8),
    }
    names = order(tensors, ["blob.a", "blob.b"])
    assert names == ["blob.b", "blob.a", "round", "odd"]
    for many in (1, 60, 200):  # headers of one page and of several
        path = tmp_path / f"{many}.safetensors"
        write(path, {name: tensors[name] for name in names}, {"format": "pt", "text": "x" * 50 * many})
        entries = read_header(path)
        assert entries["blob.b"].begin % 4096 == 0
        assert [entries[name].begin % 64 for name in names] == [0, 0, 0, 0]


def test_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ZeroskipError, match=r"x: torch.complex128 cannot be stored"):
        write(tmp_path / "a.safetensors", {"x": torch.zeros(2, dtype=torch.complex128)}, {})


def _file(path: Path, header: Any, data: bytes = b"\0" * 16) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def _one(**changes: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}}


HOSTILE: dict[str, tuple[Any, str]] = {
    "not json": (b"{", "not valid JSON"),
    "not utf-8": (b'{"\xff": 1}', "not valid JSON"),
    "a list": ([], "is a list"),
    "nested deeply": (b"[" * 200_000, "not valid JSON"),
    "a number of many digits": (b'{"x": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    "a name twice": (b'{"x": 1, "x": 2}', "occurs twice"),
    "no offsets": ({"x": {"dtype": "F32", "shape": [4]}}, "x: the header lacks"),
    "entry not an object": ({"x": 3}, "x: the header lacks"),
    "unknown dtype": (_one(dtype="F7"), "x: unknown dtype 'F7'"),
    "dtype not a name": (_one(dtype=[]), "x: unknown dtype"),
    "negative size": (_one(shape=[-4]), "x: shape"),
    "size true": (_one(shape=[True]), "x: shape"),
    "size too large": (_one(shape=[1 << 63]), "x: shape"),
    "product too large": (_one(shape=[1 << 62, 1 << 62]), "x: 16 bytes for shape"),
    "too many dimensions": (_one(shape=[1] * 1000), "x: shape"),
    "offsets reversed": (_one(data_offsets=[16, 0]), "x: data_offsets"),
    "offset beyond the file": (_one(shape=[8], data_offsets=[0, 32]), "x: data_offsets"),
    "three offsets": (_one(data_offsets=[0, 8, 16]), "x: shape"),
    "wrong length": (_one(shape=[3]), "x: 16 bytes for shape"),
    "bytes nobody owns": (_one(shape=[2], data_offsets=[0, 8]), "32 bytes|bytes where the header says"),
    "gap": (_one(shape=[2], data_offsets=[8, 16]), "x: the tensor at byte .* leaves a gap"),
    "overlap": (
        _one() | {"y": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}},
        "y: the tensor at byte .* overlaps",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_errors(tmp_path: Path, case: str) -> None:
    header, message = HOSTILE[case]
    path = _file(tmp_path / "bad.safetensors", header)
    with pytest.raises(ZeroskipError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 8, (1 << 40).to_bytes(8, "little") + b"{}"])
def test_impossible_header_lengths_are_errors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ZeroskipError, match="not a safetensors file, or cut off"):
        read_header(path)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroskipError, match="cannot be read"):
        read_header(tmp_path / "none.safetensors")


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    good = _file(tmp_path / "good.safetensors", _one()).read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(ZeroskipError):
            read_header(path)


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 200), value=st.integers(0, 255))
def test_an_edited_header_never_reaches_outside(tmp_path_factory: pytest.TempPathFactory, at: int, value: int) -> None:
    path = tmp_path_factory.getbasetemp() / "edited.safetensors"
    data = bytearray(
        _file(path, _one() | {"y": {"dtype": "U8", "shape": [2, 3], "data_offsets": [16, 22]}}, b"\1" * 22).read_bytes()
    )
    data[at % len(data)] = value
    path.write_bytes(data)
    try:
        entries = read_header(path)
    except ZeroskipError:
        return
    assert all(0 <= entry.begin <= entry.end <= len(data) for entry in entries.values())
