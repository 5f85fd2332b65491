"""Open a manifest: a Parquet file, a folder of them or a glob, local or remote, read as a stream
whose memory does not grow with the manifest."""

import hashlib
import json
import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from raydiff.errors import ManifestError
from raydiff.manifest.files import find_files, init_image_folder, relative_name
from raydiff.manifest.schema import check_schema
from raydiff.object_storage import StorageError

MAX_BATCH_ROWS = 1024
MAX_BATCH_BYTES = 32 * 2**20
READ_BUFFER_BYTES = 2**20
FINGERPRINT_BYTES = 2**18
"""Each file's end that is hashed: all of a small manifest, the footer and more of a large one."""
MAGIC = b"PAR1"
MIN_FILE_BYTES = 12
"""Magic, footer length, magic."""


class Part(Protocol):
    """A stretch of a manifest that is read in one go."""

    @property
    def num_rows(self) -> int: ...

    def batches(self, start_row: int) -> Iterator[pa.RecordBatch]:
        """Yield the part's batches from `start_row` (counted in the part) on."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class AxisSummary:
    """One axis of a sweep, for people."""

    name: str
    num_values: int
    values: str
    """The first of them, or where they come from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """An opened manifest. Its schema is checked; its values are not."""

    uri: str
    folder: Path | str | None
    """Folder that relative init images start from: a local one, or the URI of one in an object
    store; None for prompts given in place and other storage."""
    schema: pa.Schema
    num_rows: int
    fingerprint: str
    """Hash of the file names, sizes and ends: changes when the manifest does."""
    parts: tuple[Part, ...]
    axes: tuple[AxisSummary, ...] = ()
    """What a sweep varies; empty for a manifest that is read as it is."""

    def batches(self, start_row: int = 0) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield (row index of its first row, batch) from `start_row` on, in the schema's types.

        Raises ManifestError if a file is damaged or has changed since it was opened.
        """
        first = 0
        for part in self.parts:
            end = first + part.num_rows
            row = max(first, start_row)
            if row < end:
                for batch in part.batches(row - first):
                    yield row, _in_schema(batch, self.schema)
                    row += batch.num_rows
            first = end


def open_manifest(uri: str | Path) -> Manifest:
    """Open `uri`: a Parquet file, a folder or a glob; a local path or what pyarrow.fs opens.

    Files are taken in the order of their names. Raises ManifestError if there is none, one is not
    Parquet, they differ in columns, there is no row, or a known column has a wrong type.
    """
    manifest = open_parquet(str(uri))
    check_schema(manifest.schema, manifest.uri)
    return manifest


def open_parquet(uri: str) -> Manifest:
    """Open Parquet files as `open_manifest` does, whatever their columns are."""
    try:
        filesystem, base, paths = find_files(uri)
        with ThreadPoolExecutor(max_workers=8) as pool:
            read = partial(_read_footer, filesystem, base)
            parts = tuple(pool.map(read, paths))
    except (OSError, pa.ArrowException) as error:
        raise ManifestError(f"manifest {uri} cannot be read: {error}") from None
    schema = _common_schema(parts, uri)
    num_rows = sum(part.num_rows for part in parts)
    if num_rows == 0:
        raise ManifestError(f"manifest {uri} has no rows. Give it one row for each image to make.")
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(json.dumps([part.name, part.size_bytes, part.digest]).encode())
    return Manifest(
        uri=uri,
        folder=init_image_folder(filesystem, base),
        schema=schema,
        num_rows=num_rows,
        fingerprint=digest.hexdigest(),
        parts=parts,
    )


def prompts_manifest(prompts: Sequence[str]) -> Manifest:
    """Return the manifest of prompts given in place, one row each."""
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ManifestError("prompts: expected a list of texts, such as ['a lighthouse at dusk']")
    if not prompts:
        raise ManifestError("prompts: the list is empty. Give one prompt for each image to make.")
    try:
        table = pa.table({"prompt": pa.array(prompts, pa.string())})
    except UnicodeEncodeError as error:
        raise ManifestError(f"prompts: {error.object!r} is not valid Unicode text") from None
    digest = hashlib.blake2b(json.dumps(list(prompts)).encode(), digest_size=16)
    return Manifest(
        uri="prompts",
        folder=None,
        schema=table.schema,
        num_rows=table.num_rows,
        fingerprint=digest.hexdigest(),
        parts=(TablePart(table=table),),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TablePart:
    """Rows held in memory."""

    table: pa.Table

    @property
    def num_rows(self) -> int:
        num_rows: int = self.table.num_rows
        return num_rows

    def batches(self, start_row: int) -> Iterator[pa.RecordBatch]:
        yield from self.table.slice(start_row).to_batches(max_chunksize=MAX_BATCH_ROWS)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParquetPart:
    """One Parquet file, known by its footer."""

    filesystem: Any
    path: str
    name: str
    """Relative to the manifest's folder."""
    size_bytes: int
    num_rows: int
    schema: pa.Schema
    digest: str

    def batches(self, start_row: int) -> Iterator[pa.RecordBatch]:
        """Yield batches of at most MAX_BATCH_ROWS rows and about MAX_BATCH_BYTES.

        Columns are read through small buffers, not whole row groups ahead: a writer may well have
        put a million rows into one group.
        """
        try:
            with self.filesystem.open_input_file(self.path) as source:
                file = pq.ParquetFile(source, buffer_size=READ_BUFFER_BYTES, pre_buffer=False)
                if file.metadata.num_rows != self.num_rows:
                    raise ManifestError(
                        f"manifest file {self.path} has {file.metadata.num_rows} rows; it had "
                        f"{self.num_rows} when the run began. Leave it alone during a run."
                    )
                row_groups, skip = _groups_from(file.metadata, start_row)
                for batch in file.iter_batches(
                    batch_size=_batch_rows(file.metadata), row_groups=row_groups, use_threads=False
                ):
                    if skip < batch.num_rows:
                        yield batch.slice(skip)
                    skip = max(0, skip - batch.num_rows)
        except StorageError as error:
            raise ManifestError(f"manifest file {error}") from None
        except (OSError, pa.ArrowException) as error:
            raise ManifestError(
                f"manifest file {self.path} is damaged: {error}. Write or copy it again."
            ) from None


def _groups_from(metadata: Any, start_row: int) -> tuple[list[int], int]:
    """Return the row groups from `start_row` on, and the rows to skip in the first of them."""
    group, skip = 0, start_row
    while skip >= metadata.row_group(group).num_rows:
        skip -= metadata.row_group(group).num_rows
        group += 1
    return list(range(group, metadata.num_row_groups)), skip


def _batch_rows(metadata: Any) -> int:
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    size_bytes = sum(group.total_byte_size for group in groups)
    fitting: int = MAX_BATCH_BYTES * metadata.num_rows // (size_bytes + 1)
    return max(1, min(MAX_BATCH_ROWS, fitting))


def _read_footer(filesystem: Any, base: str, path: str) -> ParquetPart:
    with filesystem.open_input_file(path) as source:
        size_bytes = source.size()
        head = source.read(4)
        source.seek(max(0, size_bytes - FINGERPRINT_BYTES))
        end = source.read()
        _check_magic(path, size_bytes, head, end[-4:])
        try:
            file = pq.ParquetFile(source)
        except (OSError, pa.ArrowException) as error:
            raise ManifestError(
                f"manifest file {path} has a damaged footer: {error}. Write or copy it again."
            ) from None
        return ParquetPart(
            filesystem=filesystem,
            path=path,
            name=relative_name(path, base),
            size_bytes=size_bytes,
            num_rows=file.metadata.num_rows,
            schema=file.schema_arrow.remove_metadata(),
            digest=hashlib.blake2b(end, digest_size=16).hexdigest(),
        )


def _check_magic(path: str, size_bytes: int, head: bytes, tail: bytes) -> None:
    if size_bytes == 0:
        raise ManifestError(f"manifest file {path} is empty (0 bytes). Write or copy it again.")
    if head == MAGIC and (tail != MAGIC or size_bytes < MIN_FILE_BYTES):
        raise ManifestError(
            f"manifest file {path} is cut off: {size_bytes:,} bytes that begin as Parquet and do "
            "not end so. Write or copy it again."
        )
    if head != MAGIC:
        raise ManifestError(f"manifest file {path} is not Parquet. {_conversion(path)}")


def _conversion(path: str) -> str:
    """Say the command that turns a file of another format into a manifest."""
    read = {
        ".csv": "import pyarrow.csv as f; t = f.read_csv({0})",
        ".tsv": "import pyarrow.csv as f; "
        't = f.read_csv({0}, parse_options=f.ParseOptions(delimiter="\\t"))',
        ".jsonl": "import pyarrow.json as f; t = f.read_json({0})",
        ".txt": 'import pyarrow as f; t = f.table({{"prompt": open({0}).read().splitlines()}})',
    }.get(Path(path).suffix.lower())
    if read is None:
        return "Convert it to Parquet, with pandas, Polars, DuckDB or pyarrow."
    source, target = (
        json.dumps(name) for name in (path, Path(path).with_suffix(".parquet").as_posix())
    )
    code = f"{read.format(source)}; import pyarrow.parquet as p; p.write_table(t, {target})"
    return f"Convert it first: python -c {shlex.quote(code)}"


def _common_schema(parts: Sequence[ParquetPart], uri: str) -> pa.Schema:
    """Return the schema of all files: same columns and types, an all-null column fits any type."""
    first = parts[0]
    types = {field.name: field.type for field in first.schema}
    for part in parts[1:]:
        names = set(part.schema.names)
        if names != set(types) or len(part.schema) != len(first.schema):
            only = ", ".join(sorted(names ^ set(types))) or "one that is doubled"
            raise ManifestError(
                f"manifest {uri}: {part.name} and {first.name} have different columns: {only}. "
                "Give all files the same columns."
            )
        for field in part.schema:
            if pa.types.is_null(types[field.name]):
                types[field.name] = field.type
            elif field.type != types[field.name] and not pa.types.is_null(field.type):
                raise ManifestError(
                    f'manifest {uri}: column "{field.name}" has the type {field.type} in '
                    f"{part.name} and {types[field.name]} before it. Give all files the same."
                )
    return pa.schema([pa.field(field.name, types[field.name]) for field in first.schema])


def _in_schema(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Return the batch with the schema's column order; all-null columns get the schema's type."""
    if batch.schema.equals(schema):
        return batch
    columns = []
    for field in schema:
        column = batch.column(field.name)
        columns.append(column if column.type == field.type else column.cast(field.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)
