"""write_manifest: all of it or nothing, in one file or many, and never over what is not its own."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydiff.config import SweepConfig
from raydiff.errors import ManifestError, OutputError
from raydiff.manifest.reader import Manifest, open_manifest
from raydiff.manifest.sweep import open_sweep
from raydiff.manifest.writer import write_manifest


def made(num_rows: int) -> Manifest:
    rng = random.Random(num_rows)
    config = SweepConfig(template=f"{{prompt}} {rng.random()}", seeds=f"0-{num_rows - 1}")
    return open_sweep(config, prompts=[f"prompt {rng.random()}"])


def table(manifest: Manifest) -> pa.Table:
    return pa.Table.from_batches([batch for _, batch in manifest.batches()])


@pytest.mark.parametrize(("num_rows", "rows_per_file"), [(5000, 5000), (5001, 5000), (9000, 1000)])
def test_what_is_written_reads_back(num_rows: int, rows_per_file: int, tmp_path: Path) -> None:
    manifest = made(num_rows)
    out = tmp_path / "m.parquet"
    written = write_manifest(manifest, out, rows_per_file=rows_per_file)
    assert open_manifest(out).schema.equals(manifest.schema)
    assert table(open_manifest(out)).equals(table(manifest))
    files = [out] if out.is_file() else sorted(out.iterdir())
    assert (written.num_files, written.num_rows) == (len(files), num_rows)
    assert len(files) == -(-num_rows // rows_per_file)
    assert written.size_bytes == sum(path.stat().st_size for path in files)
    sizes = [pq.read_metadata(path).num_rows for path in files]
    assert max(sizes) <= rows_per_file
    assert max(sizes) - min(sizes) < len(sizes)
    assert list(tmp_path.iterdir()) == [out]


def test_small_batches_become_large_row_groups(tmp_path: Path) -> None:
    write_manifest(made(300_000), tmp_path / "m.parquet", rows_per_file=10**6)
    assert pq.read_metadata(tmp_path / "m.parquet").num_row_groups == 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """Rows that end in an error."""

    num_rows: int

    def batches(self, start_row: int) -> Iterator[pa.RecordBatch]:
        yield pa.record_batch({"prompt": ["x"] * 3})
        raise ManifestError("cut off")


@pytest.mark.parametrize("rows_per_file", [2, 100])
def test_an_error_leaves_what_was_there(rows_per_file: int, tmp_path: Path) -> None:
    out = tmp_path / "m.parquet"
    write_manifest(made(10), out, rows_per_file=rows_per_file)
    before = table(open_manifest(out))
    schema = pa.schema([("prompt", pa.string())])
    broken = replace(made(7), schema=schema, parts=(Cut(num_rows=7),))
    with pytest.raises(ManifestError, match="cut off"):
        write_manifest(broken, out, rows_per_file=rows_per_file, is_forced=True)
    assert table(open_manifest(out)).equals(before)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("first", [2, 100])
@pytest.mark.parametrize("second", [2, 100])
def test_only_force_replaces(first: int, second: int, tmp_path: Path) -> None:
    out = tmp_path / "m.parquet"
    write_manifest(made(10), out, rows_per_file=first)
    with pytest.raises(OutputError, match=r"exists\. Choose another --out, or replace it with"):
        write_manifest(made(20), out, rows_per_file=second)
    assert open_manifest(out).num_rows == 10
    write_manifest(made(20), out, rows_per_file=second, is_forced=True)
    assert open_manifest(out).num_rows == 20
    assert list(tmp_path.iterdir()) == [out]


def test_targets_that_cannot_be(tmp_path: Path) -> None:
    other = tmp_path / "pictures"
    other.mkdir()
    (other / "cat.png").write_bytes(b"x")
    for out, message in [
        (other, "it holds cat.png"),
        (tmp_path / "no" / "m.parquet", "does not exist. Make it first"),
        (Path("s3://bucket/m.parquet"), "only local files"),
        (Path(), "name the manifest to write"),
    ]:
        with pytest.raises(OutputError) as caught:
            write_manifest(made(3), out, rows_per_file=10, is_forced=True)
        assert message in str(caught.value)
    assert (other / "cat.png").exists()
