"""The files of the metadata table: OUT/metadata/part-<epoch>-<sequence>.parquet.

A part appears whole, by rename or as one object, and never changes. Merging writes the merged part
first, which names the parts it replaces, and removes those after: whoever reads in between leaves
the replaced ones out, and the next driver removes them.
"""

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from raydiff.errors import OutputError
from raydiff.object_storage import StoredFile
from raydiff.output.atomic import disk_error, sync_folder
from raydiff.output.metadata_schema import REPEATING_COLUMNS, with_columns
from raydiff.output.storage import Storage, open_storage, read_error

T = TypeVar("T")

PART_NAME = re.compile(r"part-(\d+)-(\d+)\.parquet")
TEMPORARY_PART_NAME = re.compile(r"\.part-\d+-\d+\.parquet\.tmp")
REPLACES = b"raydiff.replaces"
ROW_GROUP_ROWS = 4096
"""Rows that are decoded to look one of them up."""
NUM_REQUESTS = 8
"""Footers that are read from an object store at once."""

Fence = Callable[[], None]
"""Raises when this process may no longer write to the table."""


class DamagedPartError(OutputError):
    """A part is not what was written: cut, or changed."""

    def __init__(self, folder: Storage, name: str, error: Exception) -> None:
        super().__init__(f"{folder.describe(name)}: damaged: {error}")
        self.name = name
        self.uri = folder.describe(name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One file of the table, as its footer describes it."""

    folder: Storage
    name: str
    size_bytes: int
    num_rows: int
    row_group_starts: tuple[int, ...]
    """The first row of each row group, then the number of rows."""
    schema: pa.Schema
    replaces: tuple[str, ...]
    last_finished_s: float
    """Unix time of the newest row, -inf if no row has one."""

    @property
    def uri(self) -> str:
        """The part's path or URI."""
        return self.folder.describe(self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """The parts of a table in the order of their commit; the names of files that are not of it."""

    live: tuple[Part, ...]
    replaced: tuple[str, ...]
    damaged: tuple[str, ...]


def part_name(epoch: int, sequence: int) -> str:
    """Return the file name of the driver's `sequence`-th part."""
    return f"part-{epoch:06d}-{sequence:06d}.parquet"


def last_sequence(folder: Storage, epoch: int) -> int:
    """Return the highest sequence number of a driver's parts, 0 if it has none."""
    orders = (_order(file.name) for file in _part_files(folder))
    return max((sequence for owner, sequence in orders if owner == epoch), default=0)


def list_parts(place: str | Path | Storage) -> Parts:
    """Read the footers of all parts in a folder. Raises OutputError if one may not be read."""
    folder = open_storage(place)
    for _ in range(100):
        try:
            return _list_parts(folder)
        except FileNotFoundError:
            continue  # A driver at work merged parts while they were listed.
    raise OutputError(
        f"{folder.uri}: its files change faster than they can be read. Try again later."
    )


def map_parts(
    place: str | Path | Storage, columns: Sequence[str] | None, function: Callable[[pa.Table], T]
) -> tuple[list[T], list[str]]:
    """Return `function` of each part's columns, and the damaged parts; needs no lock."""
    folder = open_storage(place)
    while True:
        parts = list_parts(folder)
        results, damaged = [], [folder.describe(name) for name in parts.damaged]
        try:
            for part in parts.live:
                try:
                    results.append(function(read_columns(part, columns)))
                except DamagedPartError as error:
                    damaged.append(error.uri)
        except FileNotFoundError:
            continue  # Merged away since it was listed.
        return results, damaged


def read_columns(
    part: Part, columns: Sequence[str] | None = None, row_group: int | None = None
) -> pa.Table:
    """Read some or all columns of a part, or of one of its row groups.

    Of those asked for, the metadata's own that an older version did not write are null.
    Raises DamagedPartError, or FileNotFoundError if the part was merged away.
    """
    with _opened(part.folder, part.name, part.size_bytes) as file:
        if row_group is None:
            table = file.read(columns=columns, use_threads=False)
        else:
            table = file.read_row_group(row_group, columns=columns, use_threads=False)
    return table if columns is None else with_columns(table, columns)


def write_part(
    folder: Storage,
    name: str,
    tables: Iterator[pa.Table],
    *,
    replaces: Sequence[Part] = (),
    fence: Fence | None = None,
) -> Part:
    """Write tables of one schema as a part, durable when this returns. Raises DiskError.

    The tables come as they are written, in row groups of about ROW_GROUP_ROWS rows. `fence` is
    called before the part appears, and what it raises is raised.
    """
    first = next(tables)
    names = json.dumps([part.name for part in replaces])
    schema = first.schema.with_metadata({REPLACES: names.encode()} if replaces else None)
    tables = (table.cast(schema) for table in _row_groups(itertools.chain([first], tables)))
    path = folder.local_path(name)
    try:
        if path is not None:
            _write_file(path, schema, tables, fence)
            return read_footer(folder, name)
        sink = pa.BufferOutputStream()
        _write_tables(sink, schema, tables)
        content = sink.getvalue()
        folder.put(name, content.to_pybytes(), fence=fence)
    except OSError as error:
        raise disk_error(folder.describe(name), error) from error
    with pq.ParquetFile(content) as file:
        return _describe(folder, name, content.size, file)


def _write_file(
    path: Path, schema: pa.Schema, tables: Iterator[pa.Table], fence: Fence | None
) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            _write_tables(file, schema, tables)
            file.flush()
            os.fsync(file.fileno())
        if fence is not None:
            fence()
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_tables(sink: Any, schema: pa.Schema, tables: Iterator[pa.Table]) -> None:
    columns = _dictionary_columns(schema)
    with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=columns) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=ROW_GROUP_ROWS)


def merge_parts(name: str, parts: Sequence[Part], *, fence: Fence | None = None) -> Part:
    """Write the rows of `parts`, in their order, as one part, then remove `parts`."""
    folder = parts[0].folder
    tables = (
        read_columns(part, row_group=index).cast(parts[0].schema)
        for part in parts
        for index in range(len(part.row_group_starts) - 1)
    )
    merged = write_part(folder, name, tables, replaces=parts, fence=fence)
    remove_parts(folder, (part.name for part in parts))
    return merged


def remove_parts(folder: Storage, names: Iterable[str]) -> None:
    """Remove files of the table whose rows stand elsewhere. Raises DiskError."""
    for name in names:
        try:
            folder.delete([name])
        except OSError as error:
            raise disk_error(folder.describe(name), error) from error


def read_footer(folder: Storage, name: str, size_bytes: int | None = None) -> Part:
    """Read what a part says of itself. Raises DamagedPartError, OutputError, FileNotFoundError."""
    if size_bytes is None:
        size_bytes = folder.size(name) or 0
    with _opened(folder, name, size_bytes) as file:
        return _describe(folder, name, size_bytes, file)


def _describe(folder: Storage, name: str, size_bytes: int, file: pq.ParquetFile) -> Part:
    footer = file.metadata
    groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
    starts = itertools.accumulate((group.num_rows for group in groups), initial=0)
    return Part(
        folder=folder,
        name=name,
        size_bytes=size_bytes,
        num_rows=footer.num_rows,
        row_group_starts=tuple(starts),
        schema=file.schema_arrow.remove_metadata(),
        replaces=tuple(json.loads((footer.metadata or {}).get(REPLACES, b"[]"))),
        last_finished_s=_last_finished(groups, file.schema_arrow.names),
    )


def _list_parts(folder: Storage) -> Parts:
    files = sorted(_part_files(folder), key=lambda file: _order(file.name))
    names = [file.name for file in files]
    is_local = folder.local_path("") is not None
    if is_local or len(files) < 2:
        read = [_part_or_none(folder, file) for file in files]
    else:
        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            read = list(pool.map(lambda file: _part_or_none(folder, file), files))
    parts = [part for part in read if part is not None]
    damaged = [name for name, part in zip(names, read, strict=True) if part is None]
    replaced_names = {name for part in parts for name in part.replaces}
    return Parts(
        live=tuple(part for part in parts if part.name not in replaced_names),
        replaced=tuple(part.name for part in parts if part.name in replaced_names),
        damaged=tuple(name for name in damaged if name not in replaced_names),
    )


def _part_or_none(folder: Storage, file: StoredFile) -> Part | None:
    try:
        return read_footer(folder, file.name, file.size_bytes)
    except DamagedPartError:
        return None


def _part_files(folder: Storage) -> list[StoredFile]:
    try:
        return [file for file in folder.list_files() if PART_NAME.fullmatch(file.name)]
    except OSError as error:
        raise read_error(folder.uri, error) from error


def _order(name: str) -> tuple[int, int]:
    match = PART_NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else (0, 0)


@contextmanager
def _opened(folder: Storage, name: str, size_bytes: int) -> Iterator[pq.ParquetFile]:
    """Open a part. An OSError with an errno is the disk's; one without is Arrow's: a bad file."""
    try:
        with (
            folder.open_input(name, size_bytes) as source,
            pq.ParquetFile(source, pre_buffer=folder.local_path(name) is None) as file,
        ):
            yield file
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, KeyError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise read_error(folder.describe(name), error) from error
        raise DamagedPartError(folder, name, error) from error


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
