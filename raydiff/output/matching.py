"""Rows of two runs, matched by request_id or by the values of other columns."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raydiff.errors import ConfigError, nearest
from raydiff.output.keys import Keys, request_keys
from raydiff.output.ledger import read_results, read_results_schema
from raydiff.output.media_files import MEDIA_COLUMNS
from raydiff.output.rows_file import plain
from raydiff.output.storage import Storage, open_storage

BY_REQUEST = ("request_id",)
COLUMNS = ("request_id", "status", "error", "sha256", *MEDIA_COLUMNS)
"""What a row says of its file, beside the columns that it is matched by."""
CHUNK_ROWS = 1024

Row = dict[str, Any]
Places = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One run's rows, each key once, in the order of the manifest."""

    out: Storage
    table: pa.Table
    keys: Keys
    num_without_key: int
    """Rows that cannot be matched: a bad row of the manifest makes no request."""

    def rows(self, places: Places) -> Iterator[Row]:
        """Yield the rows at these places."""
        for start in range(0, len(places), CHUNK_ROWS):
            yield from self.table.take(pa.array(places[start : start + CHUNK_ROWS])).to_pylist()


class Matches(NamedTuple):
    """Places in the left and the right table, in the order of the left one."""

    left: Places
    right: Places
    only_left: Places
    only_right: Places


def read_side(out: str | Path | Storage, on: tuple[str, ...]) -> Side:
    """Read the rows of a run and their keys: 64 bits for the values of the columns `on`.

    Raises OutputError if `out` is not a run, ConfigError if it lacks a column or if other
    columns than request_id do not tell its requests apart.
    """
    _check_columns(out, on)
    table = read_results(out, [*COLUMNS, *on])
    if on == BY_REQUEST:
        keys, places = request_keys(table["request_id"])
    else:
        keys, places = _hash_values(table.select(on))
    rows = table.take(pa.array(places)).combine_chunks()
    _, first = np.unique(keys, return_index=True)
    if on != BY_REQUEST and len(first) < len(keys):
        _check_distinct(out, rows, keys, on)
    first.sort()
    return Side(
        out=open_storage(out),
        table=rows.take(pa.array(first)),
        keys=keys[first],
        num_without_key=table.num_rows - len(keys),
    )


def match(left: Side, right: Side) -> Matches:
    """Pair the rows that have the same key."""
    _, in_left, in_right = np.intersect1d(
        left.keys, right.keys, assume_unique=True, return_indices=True
    )
    order = np.argsort(in_left)
    return Matches(
        in_left[order],
        in_right[order],
        np.setdiff1d(np.arange(len(left.keys)), in_left, assume_unique=True),
        np.setdiff1d(np.arange(len(right.keys)), in_right, assume_unique=True),
    )


def _check_columns(out: str | Path | Storage, on: Sequence[str]) -> None:
    known = read_results_schema(out).names
    for name in on:
        if name not in known:
            raise ConfigError(
                f"column {name!r} is not in {open_storage(out).uri}; {nearest(name, known)}"
                f"known: {', '.join(known)}"
            )


def _hash_values(table: pa.Table) -> tuple[Keys, Places]:
    """Return 64 bits for the values of each row that has any, and the row's place."""
    keys, places = [], []
    place = 0
    for batch in table.to_batches(max_chunksize=CHUNK_ROWS):
        for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            if any(value is not None for value in values):
                text = json.dumps([_canonical(value) for value in values], sort_keys=True)
                digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
                keys.append(int.from_bytes(digest))
                places.append(place)
            place += 1
    return np.array(keys, np.uint64), np.array(places, np.int64)


def _canonical(value: Any) -> Any:
    """Return what 7 and 7.0 have in common: runs may hold a column as different types."""
    value = plain(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_distinct(
    out: str | Path | Storage, rows: pa.Table, keys: Keys, on: Sequence[str]
) -> None:
    """Raise ConfigError if rows of one key are different requests: which to compare is unclear."""
    order = np.argsort(keys, kind="stable")
    twins = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    requests = rows["request_id"]
    for before, after in zip(order[twins].tolist(), order[twins + 1].tolist(), strict=True):
        if requests[before].as_py() != requests[after].as_py():
            numbers = [rows["row_index"][place].as_py() for place in (before, after)]
            raise ConfigError(
                f"columns {', '.join(on)}: rows {numbers[0]} and {numbers[1]} of "
                f"{open_storage(out).uri} are different requests with the same values there. "
                "Add a column in which they differ."
            )
