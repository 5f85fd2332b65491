"""The prompts that a sweep starts from: .txt, .csv, .tsv, .jsonl or Parquet, read as a stream in
types that hold for the whole file."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from raydiff.errors import ManifestError, nearest
from raydiff.manifest.files import find_files, init_image_folder
from raydiff.manifest.reader import Manifest, Part, open_parquet
from raydiff.manifest.schema import COLUMNS, quoted

BLOCK_BYTES = 2**20
"""Arrow reads 32 blocks ahead. A line of a .csv or .tsv file must fit into one."""
HASH_BYTES = 2**20
BATCH_LINES = 1024

_TYPES = {"whole": pa.int64(), "number": pa.float64(), "boolean": pa.bool_(), "text": pa.string()}
_PATTERNS = {
    "whole": r"^-?(0|[1-9][0-9]{0,17}|[1-8][0-9]{18})$",
    "number": r"^-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?([eE][+-]?[0-9]{1,2})?$",
}
"""Numbers that keep every digit as int64 and float64: 007 and an id of 30 digits stay text."""
_WANTED = {
    "text": "text",
    "whole number": "whole numbers",
    "number": "numbers",
    "whole numbers": "lists of whole numbers",
}

Batches = Callable[[Any], Iterator[pa.RecordBatch]]
Kinds = dict[str, dict[str, tuple[int, Any]]]
"""Column -> kind of value -> (row, value) where it was first met."""


def open_source(uri: str) -> Manifest:
    """Open a file, folder or glob of prompts by the ending of its name; anything else is Parquet.

    .txt has a prompt a line, .csv a header and quotes, .tsv a header and no quoting, .jsonl an
    object a line. A column `Prompt` counts as `prompt`. Text files are read through once, to count
    their rows and to see their columns' types. Raises ManifestError.
    """
    ending = PurePosixPath(uri).suffix.lower()
    if ending in (".yaml", ".yml"):
        raise ManifestError(f"{uri} is a job file: `raydiff plan {uri}` shows the sweep in it.")
    read = _READERS.get(ending)
    source = open_parquet(uri) if read is None else _open_text(uri, read)
    return _with_prompt_column(source)


def _with_prompt_column(source: Manifest) -> Manifest:
    names: list[str] = source.schema.names
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ManifestError(
            f"{source.uri}: column {quoted(doubled[0])} is there more than once. Rename one."
        )
    alike = [name for name in names if name.lower() == "prompt"]
    if "prompt" in names or len(alike) != 1:
        return source
    renamed = pa.schema(
        [field.with_name("prompt") if field.name == alike[0] else field for field in source.schema]
    )
    return replace(
        source,
        schema=renamed,
        parts=tuple(_Renamed(part=part, old=alike[0], schema=renamed) for part in source.parts),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Renamed:
    """A part whose column of prompts has another name in its file."""

    part: Part
    old: str
    schema: pa.Schema

    @property
    def num_rows(self) -> int:
        return self.part.num_rows

    def batches(self, start_row: int) -> Iterator[pa.RecordBatch]:
        """Yield the part's batches with the prompts as `prompt`."""
        for batch in self.part.batches(start_row):
            names = ["prompt" if name == self.old else name for name in batch.schema.names]
            yield batch.rename_columns(names)


@dataclass(frozen=True, kw_only=True, slots=True)
class _TextPart:
    """One text file. It is read from its beginning each time."""

    filesystem: Any
    path: str
    read: Batches
    num_rows: int
    schema: pa.Schema

    def batches(self, start_row: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows from `start_row` on. Raises ManifestError if the file has changed."""
        row = 0
        for raw in _raw_batches(self.filesystem, self.path, self.read):
            end = row + raw.num_rows
            if end > start_row:
                yield self._typed(raw).slice(max(0, start_row - row))
            row = end
        if row != self.num_rows:
            raise ManifestError(
                f"{self.path} has {row} rows; it had {self.num_rows} when it was opened. "
                "Leave it alone during a run."
            )

    def _typed(self, raw: pa.RecordBatch) -> pa.RecordBatch:
        columns = []
        for field in self.schema:
            if field.name not in raw.schema.names:
                columns.append(pa.nulls(raw.num_rows, field.type))
                continue
            try:
                columns.append(raw.column(field.name).cast(field.type))
            except pa.ArrowInvalid as error:
                raise ManifestError(
                    f"{self.path}: column {quoted(field.name)}: {error}. Correct the file."
                ) from None
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)


def _open_text(uri: str, read: Batches) -> Manifest:
    try:
        filesystem, base, paths = find_files(uri)
        digest = hashlib.blake2b(digest_size=16)
        kinds: Kinds = {}
        counts = []
        for path in paths:
            digest.update(_content_hash(filesystem, path))
            num_rows = 0
            for raw in _raw_batches(filesystem, path, read):
                _note_kinds(kinds, raw, num_rows, is_typed=read is _read_jsonl)
                num_rows += raw.num_rows
            counts.append(num_rows)
    except OSError as error:
        raise ManifestError(f"{uri} cannot be read: {error}") from None
    if not sum(counts):
        raise ManifestError(f"{uri} has no rows. Give it a prompt a row.")
    schema = pa.schema([(name, _type(uri, name, found)) for name, found in kinds.items()])
    return Manifest(
        uri=uri,
        folder=init_image_folder(filesystem, base),
        schema=schema,
        num_rows=sum(counts),
        fingerprint=digest.hexdigest(),
        parts=tuple(
            _TextPart(filesystem=filesystem, path=path, read=read, num_rows=count, schema=schema)
            for path, count in zip(paths, counts, strict=True)
        ),
    )


def _content_hash(filesystem: Any, path: str) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    with filesystem.open_input_stream(path) as stream:
        while block := stream.read(HASH_BYTES):
            digest.update(block)
    return digest.digest()


def _raw_batches(filesystem: Any, path: str, read: Batches) -> Iterator[pa.RecordBatch]:
    """Yield what is in the file, with its problems as ManifestError."""
    try:
        with filesystem.open_input_file(path) as stream:
            yield from read(stream)
    except UnicodeDecodeError:
        raise ManifestError(f"{path} is not UTF-8 text. Save it as UTF-8.") from None
    except pa.ArrowInvalid as error:
        reason = str(error)
        if "Empty CSV" in reason:
            reason = "it is empty"
        elif "straddl" in reason:
            reason = f"a row has more than {BLOCK_BYTES:,} bytes"
        raise ManifestError(f"{path} cannot be read: {reason}. Correct the file.") from None


# -- the formats -----------------------------------------------------------------------------------


def _read_txt(stream: Any) -> Iterator[pa.RecordBatch]:
    for lines in _lines(stream):
        texts = [line for _, line in lines]
        yield pa.record_batch({"prompt": pa.array(texts, pa.string())})


def _read_csv(stream: Any) -> Iterator[pa.RecordBatch]:
    return _read_delimited(stream, pacsv.ParseOptions(newlines_in_values=True))


def _read_tsv(stream: Any) -> Iterator[pa.RecordBatch]:
    options = pacsv.ParseOptions(delimiter="\t", quote_char=False, double_quote=False)
    return _read_delimited(stream, options)


def _read_delimited(stream: Any, options: Any) -> Iterator[pa.RecordBatch]:
    """Yield every value as text, an empty one as null; columns without a name are left out."""
    block = pacsv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES)
    # Of a copy: a reader reads ahead in a thread of its own, and would take blocks of the next one.
    head = pa.BufferReader(stream.read(2 * BLOCK_BYTES))
    names = pacsv.open_csv(head, block, options).schema.names
    for name in names:
        if name and names.count(name) > 1:
            raise pa.ArrowInvalid(f"column {quoted(name)} is there more than once")
    named = [index for index, name in enumerate(names) if name]
    as_text = pacsv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()),
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    stream.seek(0)
    for batch in pacsv.open_csv(stream, block, options, as_text):
        yield batch if len(named) == len(names) else batch.select(named)


def _read_jsonl(stream: Any) -> Iterator[pa.RecordBatch]:
    for lines in _lines(stream):
        rows = [_json_object(number, line) for number, line in lines]
        names = dict.fromkeys(name for row in rows for name in row)
        yield pa.record_batch(
            {name: _json_column([row.get(name) for row in rows]) for name in names}
        )


def _lines(stream: Any) -> Iterator[list[tuple[int, str]]]:
    """Yield (line number, line) in lists, empty lines left out."""
    lines: list[tuple[int, str]] = []
    num_characters = 0
    for number, line in enumerate(io.TextIOWrapper(stream, "utf-8-sig"), start=1):
        if text := line.strip():
            lines.append((number, text))
            num_characters += len(text)
        if len(lines) == BATCH_LINES or num_characters > BLOCK_BYTES:
            yield lines
            lines, num_characters = [], 0
    if lines:
        yield lines


def _json_object(number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise pa.ArrowInvalid(f"line {number} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise pa.ArrowInvalid(f'line {number} is not an object such as {{"prompt": "a fox"}}')
    return row


def _json_column(values: list[Any]) -> pa.Array:
    """Return the values of a batch in the type they share; mixed and nested ones as their JSON."""
    kinds = {_json_kind(value) for value in values if value is not None}
    if kinds == {"whole", "number"}:
        kinds = {"number"}
    if kinds and kinds <= {"whole", "number", "boolean"} and len(kinds) == 1:
        return pa.array(values, _TYPES[kinds.pop()])
    return pa.array([_json_text(value) for value in values], pa.string())


def _json_kind(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
        return "text"
    return {bool: "boolean", int: "whole", float: "number"}.get(type(value), "text")


def _json_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


_READERS: dict[str, Batches] = {
    ".txt": _read_txt,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
}

# -- the types -------------------------------------------------------------------------------------


def _note_kinds(kinds: Kinds, batch: pa.RecordBatch, first_row: int, *, is_typed: bool) -> None:
    """Note which kinds of values each column has; in files without types, text that reads as a
    number is one."""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        found = kinds.setdefault(name, {})
        rest = pc.drop_null(column)
        kind = next(kind for kind, dtype in _TYPES.items() if dtype == column.type)
        if kind in found or not len(rest):
            continue
        if kind == "text" and not is_typed:
            kind = next((k for k, rule in _PATTERNS.items() if _all_match(rest, rule)), "text")
        index = _first_text(column) if kind == "text" else -1
        if index < 0:
            index = pc.index(column.is_valid(), True).as_py()
        found.setdefault(kind, (first_row + index, column[index].as_py()))


def _all_match(column: pa.Array, pattern: str) -> bool:
    matches: bool = pc.all(pc.match_substring_regex(column, pattern)).as_py()
    return matches


def _first_text(column: pa.Array) -> int:
    """Return the place of the first value that does not read as a number, -1 if there is none."""
    is_text = pc.invert(pc.match_substring_regex(column, _PATTERNS["number"]))
    index: int = pc.index(is_text, True).as_py()
    return index


def _type(uri: str, name: str, found: dict[str, tuple[int, Any]]) -> pa.DataType:
    column = COLUMNS.get("prompt" if name.lower() == "prompt" else name)
    if column is None:
        kinds = {"number"} if set(found) == {"whole", "number"} else set(found)
        return _TYPES[kinds.pop()] if len(kinds) == 1 else pa.string()
    if column.kind == "text" or (column.kind == "whole numbers" and "text" in found):
        return pa.string()
    for kind in ("text", "boolean"):
        if kind in found:
            row, value = found[kind]
            raise ManifestError(
                f"{uri}: column {quoted(name)} has {quoted(str(value))} in row {row}; "
                f"it needs {_WANTED[column.kind]}. Correct it."
            )
    return pa.float64() if "number" in found or column.kind == "number" else pa.int64()


def no_prompt_error(source: Manifest) -> ManifestError:
    """Return the error of a source without prompts where no template makes them."""
    names = source.schema.names
    return ManifestError(
        f'{source.uri} has no column "prompt"; {nearest("prompt", names)}found: '
        f"{', '.join(names)}. Rename the one that holds the prompts, or name it in a template: "
        f'--template "{{{names[0]}}}"'
    )
