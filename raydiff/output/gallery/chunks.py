"""The metadata as scripts: a page opened from a file may load scripts, but not fetch data.

A chunk holds some rows by column, as JSON in a script that makes one call. Its name has a hash of
its content, so an unchanged chunk keeps its name and a browser never takes an old one for new.
"""

import hashlib
import json
import math
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from raydiff.output.metadata_schema import (
    COLUMNS,
    COST_COLUMNS,
    OUTCOME_COLUMNS,
    REQUEST_COLUMNS,
    VIDEO_COLUMNS,
)

CHUNK_ROWS = 5000
MAX_CHOICES = 60
"""A column with more distinct values than this is filtered by text or range, not by choice."""
MAX_EXACT = 2**53 - 1
"""Largest integer that a JavaScript number holds exactly; larger ones travel as text."""

NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
"""What JSON has no number for, as JavaScript reads it from text."""

Kind = Literal["text", "integer", "number", "boolean", "json"]


def plain_columns(table: pa.Table) -> tuple[pa.Table, dict[str, Kind]]:
    """Return the table with every column as text, integers, numbers or booleans, and their kinds.

    Times become ISO 8601 text, lists and structs JSON, binary values their size.
    """
    columns, kinds = {}, {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks)
        columns[name], kinds[name] = _plain(column)
    return pa.table(columns), kinds


def describe_columns(table: pa.Table, kinds: dict[str, Kind]) -> list[dict[str, Any]]:
    """Return what the page must know of each column to offer a filter, axes and labels for it."""
    return [_describe(name, table[name], kinds[name]) for name in table.column_names]


def chunk_script(table: pa.Table, flaws: pa.Array) -> tuple[str, bytes]:
    """Return the file name and content of the script that holds the rows of a plain table.

    `flaws` says why a row's file has no thumbnail, null where it has one or needs none.
    """
    columns = {name: _encoded(table[name].combine_chunks()) for name in table.column_names}
    text = dumps({"rows": table.num_rows, "columns": columns, "flaws": _encoded(flaws)})
    name = f"{hashlib.blake2b(text.encode(), digest_size=10).hexdigest()}.js"
    return name, call_script("receiveChunk", name, text)


def call_script(function: str, *texts: str) -> bytes:
    """Return a script that calls `function` with texts.

    JSON in a string literal is parsed twice as fast as the same text as a JavaScript literal.
    """
    literals = (text.replace("\\", "\\\\").replace("'", "\\'") for text in texts)
    arguments = ",".join(f"'{literal}'" for literal in literals)
    return f"{function}({arguments})\n".encode("ascii")


def dumps(value: Any) -> str:
    """Write ASCII JSON: it reads the same whatever encoding a server claims for it."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _plain(column: pa.Array) -> tuple[pa.Array, Kind]:
    types, dtype = pa.types, column.type
    if types.is_dictionary(dtype):
        return _plain(column.dictionary_decode())
    if types.is_boolean(dtype):
        return column, "boolean"
    if types.is_integer(dtype):
        return column, "integer"
    if types.is_decimal(dtype):
        return column.cast(pa.float64()), "number"
    if types.is_floating(dtype):
        # Through text, 0.1 stored in 32 bits stays 0.1.
        is_short = dtype != pa.float64()
        return (column.cast(pa.string()) if is_short else column).cast(pa.float64()), "number"
    if types.is_string(dtype) or types.is_large_string(dtype) or types.is_string_view(dtype):
        return _text(column), "text"
    if types.is_timestamp(dtype):
        column = column.cast(pa.timestamp("us", dtype.tz), safe=False)
        return _strings([_iso(value) for value in column.to_pylist()]), "text"
    if types.is_nested(dtype):
        return _strings([_json(value) for value in column.to_pylist()]), "json"
    if types.is_binary(dtype) or types.is_large_binary(dtype) or types.is_fixed_size_binary(dtype):
        sizes = pc.binary_length(column).to_pylist()
        return _strings([None if size is None else f"{size} bytes" for size in sizes]), "text"
    return _strings([None if one is None else str(one) for one in column.to_pylist()]), "text"


def _text(column: pa.Array) -> pa.Array:
    """Return text as it is; bytes that are not UTF-8 are replaced."""
    column = column.cast(pa.large_string())
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        raw = column.cast(pa.large_binary()).to_pylist()
        return _strings([None if one is None else one.decode("utf-8", "replace") for one in raw])
    return column


def _strings(values: list[str | None]) -> pa.Array:
    return pa.array(values, pa.large_string())


def _iso(value: Any) -> str | None:
    return None if value is None else value.isoformat(timespec="milliseconds")


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _describe(name: str, column: pa.ChunkedArray, kind: Kind) -> dict[str, Any]:
    distinct = pc.value_counts(column)
    description: dict[str, Any] = {
        "name": name,
        "kind": kind,
        "group": _group(name),
        "num_distinct": len(distinct) - (column.null_count > 0),
        "num_null": column.null_count,
    }
    if description["num_distinct"] <= MAX_CHOICES:
        counted = [(one["values"], one["counts"]) for one in distinct.to_pylist()]
        counted.sort(key=_choice_order)
        values = _json_values(pa.array([value for value, _ in counted], column.type))
        counts = (count for _, count in counted)
        description["choices"] = list(zip(values, counts, strict=True))
    elif kind in ("integer", "number"):
        limits = pc.min_max(column)
        description["low"], description["high"] = _json_values(
            pa.array([limits["min"].as_py(), limits["max"].as_py()], column.type)
        )
    return description


def _choice_order(choice: tuple[Any, int]) -> tuple[bool, bool, Any]:
    """Sort values as they are read; NaN and null come last."""
    value = choice[0]
    if value is None or value != value:
        return True, value is None, 0
    return False, False, (value.casefold(), value) if isinstance(value, str) else value


def _group(name: str) -> str:
    if name in REQUEST_COLUMNS or name in VIDEO_COLUMNS:
        return "request"
    if name in OUTCOME_COLUMNS:
        return "outcome" if name in ("status", "error") else "file"
    if name in COST_COLUMNS:
        return "cost"
    return "run" if name in COLUMNS else "own"


def _encoded(column: pa.Array) -> dict[str, Any]:
    """Return a column as {constant}, as {values, codes} where values repeat, or as {values}."""
    if column.null_count == len(column):
        return {"constant": None}
    coded = column.dictionary_encode()
    values = _json_values(coded.dictionary)
    if len(values) == 1 and not column.null_count:
        return {"constant": values[0]}
    if len(values) * 2 <= len(column):
        return {"values": values, "codes": pc.fill_null(coded.indices, -1).to_pylist()}
    return {"values": _json_values(column)}


def _json_values(column: pa.Array) -> list[Any]:
    values: list[Any] = column.to_pylist()
    if pa.types.is_integer(column.type):
        return [
            value if value is None or -MAX_EXACT <= value <= MAX_EXACT else str(value)
            for value in values
        ]
    if pa.types.is_floating(column.type):
        return [
            value if value is None or math.isfinite(value) else NOT_FINITE[str(value)]
            for value in values
        ]
    return values
