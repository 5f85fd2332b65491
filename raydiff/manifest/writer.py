"""Write a manifest to Parquet: one file, or a folder of part files, all of it or nothing."""

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydiff.errors import OutputError
from raydiff.manifest.reader import Manifest

GROUP_ROWS = 131_072
GROUP_BYTES = 32 * 2**20
PART_NAME = "part-{:05d}.parquet"


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenManifest:
    """What was written."""

    path: str
    num_files: int
    num_rows: int
    size_bytes: int


def write_manifest(
    manifest: Manifest,
    out: str | Path,
    *,
    rows_per_file: int,
    is_forced: bool = False,
) -> WrittenManifest:
    """Write the rows to the file `out`; more than `rows_per_file` to part files in a folder `out`.

    Everything is written under a hidden name beside `out` and then takes its name. `is_forced`
    replaces a file, or a folder of part files, that is there. Raises OutputError.
    """
    out = Path(out)
    check_target(out, is_forced=is_forced)
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    is_folder = manifest.num_rows > rows_per_file
    try:
        if is_folder:
            temporary.mkdir()
        rows = _Rows(manifest)
        num_files = -(-manifest.num_rows // rows_per_file)
        rows_each = -(-manifest.num_rows // num_files)  # no last file of a few rows
        size_bytes = 0
        for index in range(num_files):
            path = temporary / PART_NAME.format(index) if is_folder else temporary
            _write_file(path, manifest.schema, rows, rows_each)
            size_bytes += path.stat().st_size
        _publish(temporary, out)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"{out}: could not be written: {reason}. Nothing was left there.") from (
            error
        )
    finally:
        _remove(temporary)
    return WrittenManifest(
        path=str(out), num_files=num_files, num_rows=manifest.num_rows, size_bytes=size_bytes
    )


def check_target(out: Path, *, is_forced: bool) -> None:
    """Raise OutputError if `out` cannot be written or is there and may not be replaced."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(out)):
        raise OutputError(f"{out}: only local files can be written. Write one and copy it there.")
    if out.name in ("", ".."):
        raise OutputError(f"{out}: name the manifest to write, e.g. {out / 'manifest.parquet'}")
    if not out.parent.is_dir():
        raise OutputError(f"{out}: the folder {out.parent} does not exist. Make it first.")
    if not out.exists():
        return
    if not is_forced:
        raise OutputError(f"{out} exists. Choose another --out, or replace it with --force.")
    if out.is_dir():
        others = [path.name for path in out.iterdir() if not path.match("part-*.parquet")]
        if others:
            raise OutputError(
                f"{out}: it holds {others[0]}, so it is not a folder of part files and is not "
                "replaced. Choose another --out."
            )


class _Rows:
    """Hands the manifest's batches out by number of rows."""

    def __init__(self, manifest: Manifest) -> None:
        self._batches = (batch for _, batch in manifest.batches())
        self._rest: Any = None

    def take(self, num_rows: int) -> Iterator[pa.RecordBatch]:
        """Yield batches with `num_rows` rows in all, fewer at the end."""
        while num_rows:
            batch = self._rest or next(self._batches, None)
            if batch is None:
                return
            self._rest = batch.slice(num_rows) if batch.num_rows > num_rows else None
            taken = batch.slice(0, num_rows)
            num_rows -= taken.num_rows
            yield taken


def _write_file(path: Path, schema: pa.Schema, rows: _Rows, num_rows: int) -> None:
    """Write the next `num_rows` rows in row groups that are bounded in rows and bytes."""
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        group: list[pa.RecordBatch] = []
        group_rows = group_bytes = 0
        for batch in rows.take(num_rows):
            group.append(batch)
            group_rows += batch.num_rows
            group_bytes += batch.nbytes
            if group_rows >= GROUP_ROWS or group_bytes >= GROUP_BYTES:
                writer.write_table(pa.Table.from_batches(group), row_group_size=group_rows)
                group, group_rows, group_bytes = [], 0, 0
        if group:
            writer.write_table(pa.Table.from_batches(group), row_group_size=group_rows)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(temporary: Path, out: Path) -> None:
    """Give what was written its name. A folder cannot be renamed over: it steps aside first."""
    if not out.is_dir() and not (temporary.is_dir() and out.exists()):
        temporary.replace(out)
        return
    aside = temporary.with_suffix(".old")
    out.rename(aside)
    try:
        temporary.rename(out)
    except OSError:
        aside.rename(out)
        raise
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
