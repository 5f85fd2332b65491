"""Rows of a query or a comparison as a file: CSV, JSON or Parquet, batch by batch."""

import base64
import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from raydiff.errors import ConfigError
from raydiff.output.atomic import written_whole

RowsFormat = Literal["csv", "json", "parquet"]
FORMATS: tuple[RowsFormat, ...] = ("csv", "json", "parquet")


def format_of(path: Path) -> RowsFormat:
    """Return the format that a file's name asks for. Raises ConfigError if it asks for none."""
    for name in FORMATS:
        if path.suffix.lower() == f".{name}":
            return name
    raise ConfigError(f"{path}: a file of rows ends in {', '.join(f'.{name}' for name in FORMATS)}")


def write_rows(path: Path, format_: RowsFormat, reader: pa.RecordBatchReader) -> int:
    """Write all rows to a file and return their number. Raises OutputError."""
    with written_whole(path) as temporary:
        if format_ == "parquet":
            return _write_parquet(temporary, reader)
        with temporary.open("w", encoding="utf-8", newline="") as file:
            return print_rows(file, format_, reader)


def print_rows(file: IO[str], format_: Literal["csv", "json"], reader: pa.RecordBatchReader) -> int:
    """Write all rows as text and return their number.

    JSON is one array with a row on each line; in CSV, nulls are empty and lists are JSON.
    """
    names = unique_names(reader.schema.names)
    return (
        _print_json(file, names, reader) if format_ == "json" else _print_csv(file, names, reader)
    )


def unique_names(names: Iterable[str]) -> list[str]:
    """Tell columns of one name apart: `count, count` become `count, count_2`."""
    taken: list[str] = []
    for name in names:
        number, candidate = 1, name
        while candidate in taken:
            number += 1
            candidate = f"{name}_{number}"
        taken.append(candidate)
    return taken


def plain(value: Any) -> Any:
    """Return a value as JSON has it: times in ISO 8601, bytes in Base64, no infinite numbers."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Decimal():
            return int(value) if value == value.to_integral_value() else float(value)
        case datetime() | date() | time():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case bytes():
            return base64.b64encode(value).decode("ascii")
        case Mapping():
            return {str(key): plain(one) for key, one in value.items()}
        case list() | tuple():
            return [plain(one) for one in value]
        case None | bool() | int() | str():
            return value
    return str(value)


def _rows(reader: pa.RecordBatchReader) -> Iterator[tuple[Any, ...]]:
    for batch in reader:
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _print_json(file: IO[str], names: list[str], reader: pa.RecordBatchReader) -> int:
    num_rows = 0
    for num_rows, row in enumerate(_rows(reader), start=1):
        values = dict(zip(names, map(plain, row), strict=True))
        file.write(("[\n" if num_rows == 1 else ",\n") + json.dumps(values, ensure_ascii=False))
    file.write("\n]\n" if num_rows else "[]\n")
    return num_rows


def _print_csv(file: IO[str], names: list[str], reader: pa.RecordBatchReader) -> int:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    num_rows = 0
    for row in _rows(reader):
        writer.writerow([_csv_text(value) for value in row])
        num_rows += 1
    return num_rows


def _csv_text(value: Any) -> Any:
    if isinstance(value, float):
        return value
    value = plain(value)
    if isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False)
    return value


def _write_parquet(path: Path, reader: pa.RecordBatchReader) -> int:
    fields = zip(unique_names(reader.schema.names), reader.schema, strict=True)
    schema = pa.schema([field.with_name(name) for name, field in fields])
    num_rows = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in reader:
            writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
            num_rows += batch.num_rows
    return num_rows
