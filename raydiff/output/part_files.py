"""The files of the metadata table: OUT/metadata/part-<epoch>-<sequence>.parquet.

A part appears whole, by rename, and never changes. Merging writes the merged part first, which
names the parts it replaces, and removes those after: whoever reads in between leaves the replaced
ones out, and the next driver removes them.
"""

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from raydiff.errors import OutputError
from raydiff.output.atomic import disk_error, sync_folder
from raydiff.output.metadata_schema import REPEATING_COLUMNS

T = TypeVar("T")

PART_NAME = re.compile(r"part-(\d+)-(\d+)\.parquet")
TEMPORARY_PART_NAME = re.compile(r"\.part-\d+-\d+\.parquet\.tmp")
REPLACES = b"raydiff.replaces"
ROW_GROUP_ROWS = 4096
"""Rows that are decoded to look one of them up."""


class DamagedPartError(OutputError):
    """The part at `path` is not what was written: cut, or changed."""

    def __init__(self, path: Path, error: Exception) -> None:
        super().__init__(f"{path}: damaged: {error}")
        self.path = path


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One file of the table, as its footer describes it."""

    path: Path
    num_rows: int
    row_group_starts: tuple[int, ...]
    """The first row of each row group, then the number of rows."""
    schema: pa.Schema
    replaces: tuple[str, ...]
    last_finished_s: float
    """Unix time of the newest row, -inf if no row has one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """The parts of a table in the order of their commit; the files that are not of it."""

    live: tuple[Part, ...]
    replaced: tuple[Path, ...]
    damaged: tuple[Path, ...]


def part_name(epoch: int, sequence: int) -> str:
    """Return the file name of the driver's `sequence`-th part."""
    return f"part-{epoch:06d}-{sequence:06d}.parquet"


def last_sequence(folder: Path, epoch: int) -> int:
    """Return the highest sequence number of a driver's parts, 0 if it has none."""
    orders = (_order(path) for path in _part_paths(folder))
    return max((sequence for owner, sequence in orders if owner == epoch), default=0)


def list_parts(folder: Path) -> Parts:
    """Read the footers of all parts in `folder`. Raises OutputError if one may not be read."""
    for _ in range(100):
        try:
            return _list_parts(folder)
        except FileNotFoundError:
            continue  # A driver at work merged parts while they were listed.
    raise OutputError(f"{folder}: its files change faster than they can be read. Try again later.")


def map_parts(
    folder: Path, columns: Sequence[str] | None, function: Callable[[pa.Table], T]
) -> tuple[list[T], list[Path]]:
    """Return `function` of each part's columns, and the damaged parts; needs no lock."""
    while True:
        parts = list_parts(folder)
        results, damaged = [], list(parts.damaged)
        try:
            for part in parts.live:
                try:
                    results.append(function(read_columns(part, columns)))
                except DamagedPartError as error:
                    damaged.append(error.path)
        except FileNotFoundError:
            continue  # Merged away since it was listed.
        return results, damaged


def read_columns(
    part: Part, columns: Sequence[str] | None = None, row_group: int | None = None
) -> pa.Table:
    """Read some or all columns of a part, or of one of its row groups.

    Raises DamagedPartError, or FileNotFoundError if the part was merged away.
    """
    with _opened(part.path) as file:
        if row_group is None:
            return file.read(columns=columns, use_threads=False)
        return file.read_row_group(row_group, columns=columns, use_threads=False)


def write_part(path: Path, tables: Iterator[pa.Table], *, replaces: Sequence[Part] = ()) -> Part:
    """Write tables of one schema as a part, durable when this returns. Raises DiskError.

    The tables come as they are written, in row groups of about ROW_GROUP_ROWS rows.
    """
    first = next(tables)
    names = json.dumps([part.path.name for part in replaces])
    schema = first.schema.with_metadata({REPLACES: names.encode()} if replaces else None)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            with pq.ParquetWriter(
                file, schema, compression="zstd", use_dictionary=_dictionary_columns(schema)
            ) as writer:
                for table in _row_groups(itertools.chain([first], tables)):
                    writer.write_table(table.cast(schema), row_group_size=ROW_GROUP_ROWS)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(path, error) from error
    return read_footer(path)


def merge_parts(path: Path, parts: Sequence[Part]) -> Part:
    """Write the rows of `parts`, in their order, as one part, then remove `parts`."""
    tables = (
        read_columns(part, row_group=index)
        for part in parts
        for index in range(len(part.row_group_starts) - 1)
    )
    merged = write_part(path, (table.cast(parts[0].schema) for table in tables), replaces=parts)
    remove_parts(part.path for part in parts)
    return merged


def remove_parts(paths: Iterator[Path] | Sequence[Path]) -> None:
    """Remove files of the table whose rows stand elsewhere. Raises DiskError."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(path, error) from error


def read_footer(path: Path) -> Part:
    """Read what a part says of itself. Raises DamagedPartError, OutputError, FileNotFoundError."""
    with _opened(path) as file:
        footer = file.metadata
        groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
        starts = itertools.accumulate((group.num_rows for group in groups), initial=0)
        return Part(
            path=path,
            num_rows=footer.num_rows,
            row_group_starts=tuple(starts),
            schema=file.schema_arrow.remove_metadata(),
            replaces=tuple(json.loads((footer.metadata or {}).get(REPLACES, b"[]"))),
            last_finished_s=_last_finished(groups, file.schema_arrow.names),
        )


def _list_parts(folder: Path) -> Parts:
    parts, damaged = [], []
    for path in sorted(_part_paths(folder), key=_order):
        try:
            parts.append(read_footer(path))
        except DamagedPartError:
            damaged.append(path)
    replaced_names = {name for part in parts for name in part.replaces}
    return Parts(
        live=tuple(part for part in parts if part.path.name not in replaced_names),
        replaced=tuple(part.path for part in parts if part.path.name in replaced_names),
        damaged=tuple(path for path in damaged if path.name not in replaced_names),
    )


def _part_paths(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if PART_NAME.fullmatch(path.name)]
    except FileNotFoundError:
        return []


def _order(path: Path) -> tuple[int, int]:
    match = PART_NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2])) if match else (0, 0)


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a part. An OSError with an errno is the disk's; one without is Arrow's: a bad file."""
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, KeyError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise OutputError(
                f"{path}: cannot be read: {error.strerror}. Make it readable and try again."
            ) from error
        raise DamagedPartError(path, error) from error


def _row_groups(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Join small tables until they are worth a row group."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(one.num_rows for one in waiting) >= ROW_GROUP_ROWS:
            yield pa.concat_tables(waiting).combine_chunks()
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()


def _dictionary_columns(schema: pa.Schema) -> list[str]:
    from_manifest = schema.names[schema.get_field_index("warning") + 1 :]
    return [*REPEATING_COLUMNS, *from_manifest]


def _last_finished(groups: Sequence[Any], names: Sequence[str]) -> float:
    latest = float("-inf")
    if "finished_at" not in names:
        return latest
    for group in groups:
        for column in (group.column(index) for index in range(group.num_columns)):
            statistics = column.statistics if column.path_in_schema == "finished_at" else None
            if statistics is not None and statistics.has_min_max:
                latest = max(latest, statistics.max.timestamp())
    return latest
