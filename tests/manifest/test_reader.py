"""open_manifest: what is read, in which order and how much at once, and every file it refuses."""

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydiff.errors import ManifestError
from raydiff.manifest.reader import (
    MAX_BATCH_BYTES,
    MAX_BATCH_ROWS,
    Manifest,
    open_manifest,
    prompts_manifest,
)


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def prompts(manifest: Manifest, start_row: int = 0) -> list[str]:
    found: list[str] = []
    for row_index, batch in manifest.batches(start_row):
        assert row_index == start_row + len(found)
        assert batch.schema.equals(manifest.schema)
        found += batch.column("prompt").to_pylist()
    return found


def refusal(uri: str | Path) -> str:
    with pytest.raises(ManifestError) as caught:
        open_manifest(uri)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rows_of_a_file_from_any_row_on(tmp_path: Path) -> None:
    texts = [f"prompt {i} é☕" for i in range(2500)]
    path = write(tmp_path / "m.parquet", {"prompt": texts}, row_group_size=300)
    manifest = open_manifest(str(path))
    assert manifest.num_rows == 2500
    assert manifest.folder == tmp_path
    for start_row in (0, 1, 299, 300, 301, 1024, 2499, 2500):
        assert prompts(manifest, start_row) == texts[start_row:]


def test_files_of_a_folder_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write(folder / "b.parquet", {"prompt": ["b0", "b1"]})
    write(folder / "a.parquet", {"prompt": ["a0", "a1", "a2"]})
    write(folder / "deep" / "c.parquet", {"prompt": ["c0"]})
    write(folder / "_temporary" / "d.parquet", {"prompt": ["no"]})
    write(folder / ".hidden.parquet", {"prompt": ["no"]})
    (folder / "_SUCCESS").touch()
    (folder / "README.md").write_text("words")
    manifest = open_manifest(folder)
    assert manifest.folder == folder
    assert prompts(manifest) == ["a0", "a1", "a2", "b0", "b1", "c0"]
    assert prompts(manifest, 4) == ["b1", "c0"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.parquet", ["a", "b1", "b2"]),
        ("b?.parquet", ["b1", "b2"]),
        ("b[!1].parquet", ["b2"]),
        ("*/*.parquet", ["c", "d"]),
        ("**/[cd].parquet", ["c", "d"]),
        ("**/*.parquet", ["a", "b1", "b2", "c", "d"]),
        ("x/*", ["c"]),
    ],
)
def test_globs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, found: list[str]
) -> None:
    for name in ("a", "b1", "b2", "x/c", "y+z/d"):
        write(tmp_path / f"{name}.parquet", {"prompt": [Path(name).name]})
    assert prompts(open_manifest(f"{tmp_path}/{pattern}")) == found
    monkeypatch.chdir(tmp_path)
    assert prompts(open_manifest(pattern)) == found
    if "?" not in pattern:
        assert prompts(open_manifest(f"file://{tmp_path}/{pattern}")) == found


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "part[1]*.parquet", {"prompt": ["x"]})
    write(tmp_path / "part1.parquet", {"prompt": ["y"]})
    assert prompts(open_manifest(path)) == ["x"]


def test_relative_paths_and_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "home" / "m.parquet", {"prompt": ["x"]})
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert prompts(open_manifest("../home/m.parquet")) == ["x"]
    assert prompts(open_manifest("../home")) == ["x"]
    assert prompts(open_manifest("../home/*.parquet")) == ["x"]
    assert prompts(open_manifest("~/m.parquet")) == ["x"]


def test_storage_that_only_fsspec_knows(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    path = write(tmp_path / "m.parquet", {"prompt": ["x", "y"]})
    with fsspec.open("memory://bucket/a.parquet", "wb") as file:
        file.write(path.read_bytes())
    for uri in ("memory://bucket/a.parquet", "memory://bucket", "memory://bucket/*.parquet"):
        manifest = open_manifest(uri)
        assert prompts(manifest) == ["x", "y"]
        assert manifest.folder is None
    assert "nowhere://x" in refusal("nowhere://x")


def test_batches_are_small_whatever_the_row_groups(tmp_path: Path) -> None:
    rng = random.Random(3)
    plain = write(tmp_path / "plain.parquet", {"prompt": [f"{i}" for i in range(50_000)]})
    sizes = [batch.num_rows for _, batch in open_manifest(plain).batches()]
    assert max(sizes) <= MAX_BATCH_ROWS
    blobs = [rng.randbytes(2**20) for _ in range(48)]
    wide = write(tmp_path / "wide.parquet", {"prompt": ["x"] * 48, "blob": blobs})
    batches = [batch for _, batch in open_manifest(wide).batches()]
    assert max(batch.nbytes for batch in batches) <= 1.1 * MAX_BATCH_BYTES
    assert [b for batch in batches for b in batch.column("blob").to_pylist()] == blobs


def test_reading_a_large_row_group_takes_little_memory(tmp_path: Path) -> None:
    rng = random.Random(4)
    texts = [rng.randbytes(120).hex() for _ in range(150_000)]
    path = write(tmp_path / "m.parquet", {"prompt": texts}, row_group_size=150_000)
    del texts
    before = pa.total_allocated_bytes()
    peak = max(pa.total_allocated_bytes() for _ in open_manifest(path).batches())
    assert path.stat().st_size > 30e6
    assert peak - before < 12e6


def test_an_all_null_column_takes_the_type_it_has_elsewhere(tmp_path: Path) -> None:
    nulls = pa.nulls(2)
    write(tmp_path / "a.parquet", {"prompt": ["a", "b"], "seed": nulls, "note": nulls})
    write(tmp_path / "b.parquet", {"note": ["n"], "seed": [3], "prompt": ["c"]})
    manifest = open_manifest(tmp_path)
    assert manifest.schema == pa.schema(
        [("prompt", pa.string()), ("seed", pa.int64()), ("note", pa.string())]
    )
    rows = [row for _, batch in manifest.batches() for row in batch.to_pylist()]
    assert rows[0] == {"prompt": "a", "seed": None, "note": None}
    assert rows[2] == {"prompt": "c", "seed": 3, "note": "n"}


def test_the_fingerprint_follows_content_and_names(tmp_path: Path) -> None:
    def fingerprint(name: str, texts: list[str], **options: Any) -> str:
        return open_manifest(write(tmp_path / name, {"prompt": texts}, **options)).fingerprint

    texts = [f"prompt {i}" for i in range(100)]
    first = fingerprint("x/m.parquet", texts)
    assert fingerprint("y/m.parquet", texts) == first
    assert fingerprint("y/n.parquet", texts) != first
    # One letter in the middle: same size, same column statistics.
    changed = [*texts[:50], "prompt 5x", *texts[51:]]
    assert fingerprint("y/m.parquet", changed, write_statistics=False) != fingerprint(
        "y/m.parquet", texts, write_statistics=False
    )


def test_prompts_given_in_place() -> None:
    texts = [f"prompt {i}\0\n../x" for i in range(3000)]
    manifest = prompts_manifest(texts)
    assert (manifest.num_rows, manifest.folder) == (3000, None)
    assert prompts(manifest) == texts
    assert prompts(manifest, 1500) == texts[1500:]
    assert manifest.fingerprint == prompts_manifest(tuple(texts)).fingerprint
    assert manifest.fingerprint != prompts_manifest(texts[1:]).fingerprint


@pytest.mark.parametrize("texts", [[], "one text", ["a", 3], ["\ud800"]])
def test_prompts_that_are_no_list_of_texts_are_refused(texts: Any) -> None:
    with pytest.raises(ManifestError, match=r"^prompts: "):
        prompts_manifest(texts)


def test_a_missing_file_folder_or_match(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "no.parquet")
    assert "matches no file" in refusal(f"{tmp_path}/*.parquet")
    assert "matches no file" in refusal(f"{tmp_path}/no/*/x.parquet")


def test_a_folder_without_parquet(tmp_path: Path) -> None:
    assert "it is empty" in refusal(tmp_path)
    (tmp_path / "prompts.csv").write_text("prompt\na\n")
    assert "1 other files, e.g. " in refusal(tmp_path)


def test_an_empty_file_and_one_without_rows(tmp_path: Path) -> None:
    empty = tmp_path / "empty.parquet"
    empty.touch()
    assert "is empty (0 bytes)" in refusal(empty)
    rowless = write(tmp_path / "rowless.parquet", {"prompt": pa.array([], pa.string())})
    assert "has no rows" in refusal(rowless)


def test_a_truncated_file(tmp_path: Path) -> None:
    path = write(tmp_path / "m.parquet", {"prompt": [f"prompt {i}" for i in range(1000)]})
    whole = path.read_bytes()
    for size in (1, 4, 7, 8, 12, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        message = refusal(path)
        assert str(path) in message
        assert ("not Parquet" if size < 4 else "cut off") in message


def test_a_damaged_footer(tmp_path: Path) -> None:
    path = write(tmp_path / "m.parquet", {"prompt": [f"prompt {i}" for i in range(1000)]})
    whole = path.read_bytes()
    path.write_bytes(whole[:-200] + bytes(192) + whole[-8:])
    assert "damaged footer" in refusal(path)
    path.write_bytes(whole[:-8] + b"\xff\xff\xff\x7f" + whole[-4:])
    assert "damaged footer" in refusal(path)


def test_damaged_pages_are_found_while_reading(tmp_path: Path) -> None:
    path = write(tmp_path / "m.parquet", {"prompt": [f"prompt {i}" for i in range(9000)]})
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\xff" * 3000 + whole[3004:])
    manifest = open_manifest(path)
    with pytest.raises(ManifestError, match="is damaged"):
        list(manifest.batches())


def test_a_file_that_changes_during_the_run(tmp_path: Path) -> None:
    path = write(tmp_path / "m.parquet", {"prompt": ["a", "b"]})
    manifest = open_manifest(path)
    write(path, {"prompt": ["a", "b", "c"]})
    with pytest.raises(ManifestError, match="has 3 rows; it had 2 when the run began"):
        list(manifest.batches())
    path.unlink()
    with pytest.raises(ManifestError, match=r"m\.parquet"):
        list(manifest.batches())


def test_files_that_differ_in_columns_or_types(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"prompt": ["a"], "seed": [1]})
    write(tmp_path / "b.parquet", {"prompt": ["a"], "note": ["x"]})
    message = refusal(tmp_path)
    assert "b.parquet and a.parquet have different columns: note, seed." in message
    write(tmp_path / "b.parquet", {"prompt": ["a"], "seed": ["1"]})
    assert 'column "seed" has the type string in b.parquet and int64 before' in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", "prompt,seed\na fox,3\nan owl,4\n"),
        ("p.tsv", "prompt\tseed\na fox\t3\nan owl\t4\n"),
        ("p.jsonl", '{"prompt": "a fox"}\n{"prompt": "an owl"}\n'),
        ("p.txt", "a fox\nan owl\n"),
        ("it's.csv", "prompt\na fox\nan owl\n"),
    ],
)
def test_other_formats_are_refused_with_a_command_that_converts_them(
    tmp_path: Path, name: str, content: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    message = refusal(path)
    assert "is not Parquet. Convert it first: python -c " in message
    command = message.partition("Convert it first: python ")[2]
    subprocess.run(f"{sys.executable} {command}", shell=True, check=True)
    assert prompts(open_manifest(path.with_suffix(".parquet"))) == ["a fox", "an owl"]


def test_any_other_file_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    path.write_bytes(random.Random(1).randbytes(5000))
    assert "is not Parquet. Convert it to Parquet" in refusal(path)


def test_opening_is_quick_to_import() -> None:
    code = (
        "import sys, raydiff.manifest.rows; "
        "print([m for m in ('torch', 'ray', 'PIL', 'pandas', 'fsspec') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
