"""Sources of a sweep: what each format means, in types that hold for the whole file."""

import json
import random
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFile

from raydiff.errors import ManifestError
from raydiff.manifest import sources
from raydiff.manifest.sources import open_source


def read(path: Path | str, start_row: int = 0) -> list[dict[str, Any]]:
    source = open_source(str(path))
    rows: list[dict[str, Any]] = []
    for first, batch in source.batches(start_row):
        assert first == start_row + len(rows)
        assert batch.schema.equals(source.schema)
        rows += batch.to_pylist()
    assert len(rows) == source.num_rows - start_row
    return rows


def write(path: Path, content: str) -> Path:
    path.write_bytes(content.encode())
    return path


def test_txt_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", '\ufeffa "red" fox\r\n\r\n  an owl, at night \n{x}\u2028__y__')
    assert [row["prompt"] for row in read(path)] == [
        'a "red" fox', "an owl, at night", "{x}\u2028__y__",
    ]  # fmt: skip


def test_csv_has_quotes_and_tsv_has_not(tmp_path: Path) -> None:
    text = 'prompt,note\n"a ""red"" fox, in\nsnow",x\nowl,\n'
    assert read(write(tmp_path / "p.csv", text)) == [
        {"prompt": 'a "red" fox, in\nsnow', "note": "x"},
        {"prompt": "owl", "note": None},
    ]
    text = 'Prompt\tCategory\tNote\nthe word "FOX\tAnimals\t\n"owl"\tAnimals\t"a, b"\n'
    assert read(write(tmp_path / "p.tsv", text)) == [
        {"prompt": 'the word "FOX', "Category": "Animals", "Note": None},
        {"prompt": '"owl"', "Category": "Animals", "Note": '"a, b"'},
    ]


def test_types_hold_for_the_whole_file(tmp_path: Path) -> None:
    rng = random.Random(5)
    lines = ["prompt,seed,whole,number,late,zip,big,empty"]
    for row in range(30_000):
        late = "late" if row == 29_999 else row
        prompt = "1984" if row == 0 else rng.randbytes(100).hex()
        lines.append(
            f"{prompt},{row},{row},{rng.choice(['1', '2.5', '1e3'])},{late},02139,1{row:030},"
        )
    path = write(tmp_path / "p.csv", "\n".join(lines))
    source = open_source(str(path))
    assert {field.name: field.type for field in source.schema} == {
        "prompt": pa.string(), "seed": pa.int64(), "whole": pa.int64(), "number": pa.float64(),
        "late": pa.string(), "zip": pa.string(), "big": pa.string(), "empty": pa.string(),
    }  # fmt: skip
    rows = read(path)
    assert (rows[0]["prompt"], rows[-1]["late"]) == ("1984", "late")
    assert read(path, 20_000) == rows[20_000:]


def test_jsonl_keeps_its_types(tmp_path: Path) -> None:
    rows = [
        {"prompt": "1984", "seed": 7, "tag": "12", "mixed": 1, "score": 1},
        {"prompt": None, "tag": None, "mixed": "x", "score": 0.5, "deep": {"a": [1]}, "yes": True},
    ]
    path = write(tmp_path / "p.jsonl", "\n\n".join(json.dumps(row) for row in rows))
    assert read(path) == [
        {"prompt": "1984", "seed": 7, "tag": "12", "mixed": "1", "score": 1.0, "deep": None,
         "yes": None},
        {"prompt": None, "seed": None, "tag": None, "mixed": "x", "score": 0.5,
         "deep": '{"a": [1]}', "yes": True},
    ]  # fmt: skip
    many = [{"prompt": f"{i}", "late": i if i < 2999 else "x"} for i in range(3000)]
    path = write(tmp_path / "q.jsonl", "\n".join(json.dumps(row) for row in many))
    assert [row["late"] for row in read(path, 2990)] == [*map(str, range(2990, 2999)), "x"]


def test_parquet_and_globs(tmp_path: Path) -> None:
    for name, values in (("a", ["x", "y"]), ("b", ["z"])):
        table = pa.table({"Prompt": values, "Task": ["counting"] * len(values)})
        pq.write_table(table, tmp_path / f"{name}.parquet")
        write(tmp_path / f"{name}.txt", "\n".join(values))
    for uri in (tmp_path, tmp_path / "*.parquet"):
        assert [row["prompt"] for row in read(uri)] == ["x", "y", "z"]
        assert read(uri, 2) == [{"prompt": "z", "Task": "counting"}]
    assert [row["prompt"] for row in read(tmp_path / "*.txt", 1)] == ["y", "z"]


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", "a\nb\n")
    first = open_source(str(path)).fingerprint
    assert open_source(str(write(tmp_path / "q.txt", "a\nb\n"))).fingerprint == first
    assert open_source(str(write(path, "a\nc\n"))).fingerprint != first


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", "a\nb\n")
    source = open_source(str(path))
    write(path, "a\n")
    with pytest.raises(ManifestError, match="has 1 rows; it had 2"):
        list(source.batches())


def test_reading_takes_little_memory(tmp_path: Path) -> None:
    rng = random.Random(6)
    lines = "\n".join(f"{i},{rng.randbytes(100).hex()}" for i in range(300_000))
    path = write(tmp_path / "p.csv", f"n,prompt\n{lines}")
    assert path.stat().st_size > 60e6
    del lines
    before = pa.total_allocated_bytes()
    peak = max(pa.total_allocated_bytes() for _ in open_source(str(path)).batches())
    assert peak - before < 45e6  # Arrow reads 32 blocks of 1 MiB ahead


def test_every_row_is_read_where_reading_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    content = "n,prompt\n" + "".join(f"{i},prompt {i}\n" for i in range(20_000))
    with fsspec.open("memory://slow/p.csv", "w") as file:
        file.write(content)

    def read(file: MemoryFile, size: int = -1) -> bytes:
        time.sleep(0.001)
        return BytesIO.read(file, size)

    monkeypatch.setattr(MemoryFile, "read", read, raising=False)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 16_384)
    source = open_source("memory://slow/p.csv")
    assert source.num_rows == 20_000
    assert [n for _, batch in source.batches() for n in batch["n"].to_pylist()] == [*range(20_000)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n \n", "has no rows"),
        ("p.csv", "", "it is empty"),
        ("p.csv", "prompt\n", "has no rows"),
        ("p.csv", "prompt,note\na,b\nc\n", "Expected 2 columns, got 1"),
        ("p.csv", f"prompt\na\n{'x' * 3_000_000}\n", "more than 1,048,576 bytes"),
        ("p.csv", "a,a\n1,2\n", 'column "a" is there more than once'),
        ("p.csv", "prompt,seed\na,1\nb,x2\n", 'column "seed" has "x2" in row 1; it needs whole'),
        ("p.csv", "prompt,guidance_scale\na,high\n", 'has "high" in row 0; it needs numbers'),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON"),
        ("p.jsonl", '["a"]\n', "line 1 is not an object"),
        ("p.jsonl", '{"prompt": "a", "seed": "7"}\n', 'column "seed" has "7" in row 0'),
        ("p.jsonl", '{"prompt": "a", "seed": true}\n', 'column "seed" has "True" in row 0'),
        ("p.xlsx", "PK", "is not Parquet"),
        ("job.yaml", "out: x", "is a job file: `raydiff plan"),
    ],
)
def test_bad_files_are_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ManifestError) as caught:
        read(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl"])
def test_text_that_is_not_utf8_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b'prompt\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(ManifestError, match=r"(?i)utf-?8"):
        read(tmp_path / name)


def test_what_is_not_there(tmp_path: Path) -> None:
    for uri in (tmp_path / "no.csv", tmp_path / "no.parquet", tmp_path / "*.txt", tmp_path):
        with pytest.raises(ManifestError, match=r"does not exist|matches no file|it is empty"):
            open_source(str(uri))
