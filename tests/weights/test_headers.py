"""Headers of .safetensors files, whole and broken."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from raydiff.errors import ModelError
from raydiff.weights.headers import read_header, read_metadata


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    torch.manual_seed(1)
    tensors = {
        "a": torch.randn(3, 5),
        "b.weight": torch.randn(2, 7).half(),
        "c": torch.randn(9).bfloat16(),
        "scalar": torch.randn(()),
        "empty": torch.empty(0),
        "ids": torch.arange(4),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_tensors_are_where_the_header_says(file: Path) -> None:
    header = read_header(file)
    assert {name: (t.dtype, t.shape, t.size_bytes) for name, t in header.items()} == {
        "a": ("F32", (3, 5), 60),
        "b.weight": ("F16", (2, 7), 28),
        "c": ("BF16", (9,), 18),
        "scalar": ("F32", (), 4),
        "empty": ("F32", (0,), 0),
        "ids": ("I64", (4,), 32),
    }
    content = file.read_bytes()
    ids = header["ids"]
    stored = content[ids.offset : ids.offset + ids.size_bytes]
    assert torch.frombuffer(bytearray(stored), dtype=torch.int64).tolist() == [0, 1, 2, 3]
    assert read_metadata(file) == {"format": "pt"}


@pytest.mark.parametrize("size", [0, 5])
def test_a_file_without_room_for_a_header_length(tmp_path: Path, size: int) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(b"\x01" * size)
    with pytest.raises(
        ModelError, match=rf"short\.safetensors: expected at least 8 .*found {size}"
    ):
        read_header(path)


@pytest.mark.parametrize("missing", [1, 100])
def test_a_truncated_file_says_expected_and_found(file: Path, missing: int) -> None:
    whole = file.stat().st_size
    with file.open("r+b") as handle:
        handle.truncate(whole - missing)
    with pytest.raises(ModelError, match=f"promises {whole} bytes, found {whole - missing}.*again"):
        read_header(file)


def test_a_file_cut_within_its_header(file: Path) -> None:
    with file.open("r+b") as handle:
        handle.truncate(50)
    with pytest.raises(ModelError, match=r"its header alone needs \d+ bytes, found 50"):
        read_header(file)


def test_bytes_after_the_last_tensor(file: Path) -> None:
    whole = file.stat().st_size
    with file.open("ab") as handle:
        handle.write(b"more")
    with pytest.raises(ModelError, match=f"promises {whole} bytes, found {whole + 4}"):
        read_header(file)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"<html><head>Not Found</head></html>", "no header length"),
        (b"\x10\0\0\0\0\0\0\0" + b"x" * 40, "not JSON"),
        (b"\x04\0\0\0\0\0\0\0[12]", "not a JSON object"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "page.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=f"{problem}; not a safetensors file"):
        read_header(path)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"dtype": "F32", "shape": [2]}, "lacks dtype, shape or data_offsets"),
        ({"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}, "lacks dtype"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, r"has dtype 'F32' and shape \["),
        ({"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}, "has dtype 'F99'"),
        ({"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, "has dtype"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "12 bytes, not 8"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "starts at byte"),
        ("text", "lacks dtype"),
    ],
)
def test_wrong_entries_are_named(tmp_path: Path, entry: Any, problem: str) -> None:
    path = write(tmp_path / "odd.safetensors", {"x": entry}, b"\0" * 8)
    with pytest.raises(ModelError, match=f"tensor 'x' {problem}|tensor 'x' is .*{problem}"):
        read_header(path)


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    path = write(tmp_path / "odd.safetensors", {"x": entry, "y": entry}, b"\0" * 8)
    with pytest.raises(ModelError, match="tensor 'y' starts at byte"):
        read_header(path)


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".PTH"])
def test_pickles_are_refused_unopened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    with pytest.raises(ModelError, match=r"refused, .* is a pickle .*save_file"):
        read_header(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(ModelError, match="directory"):
        read_header(tmp_path)
