"""Which results a contact sheet shows, and in which of its cells."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raydiff.errors import ConfigError, OutputError, nearest
from raydiff.output.ledger import read_results, read_results_schema
from raydiff.output.media_files import MEDIA_COLUMNS
from raydiff.output.metadata_schema import REQUEST_COLUMNS, VIDEO_COLUMNS
from raydiff.output.rows_file import plain

NOT_COMPARED = ("init_image_sha256", "model_revision", "stg_blocks")
COMPARED_COLUMNS = tuple(
    name for name in (*REQUEST_COLUMNS, *VIDEO_COLUMNS) if name not in NOT_COMPARED
)
SHOWN_COLUMNS = ("request_id", "status", "error", *MEDIA_COLUMNS, *COMPARED_COLUMNS)

Row = dict[str, Any]
Numbers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """A metadata column whose values label the rows, columns or pages of a sheet."""

    name: str
    values: tuple[Any, ...]
    """Numbers and times ascending, texts in the order of the manifest, null last."""

    @property
    def labels(self) -> list[str]:
        """The values as text."""
        return [label(value) for value in self.values]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """What one place of a sheet shows."""

    row: Row
    num_results: int
    """Results that belong here; the first completed one by row is shown, else the first."""


class SheetGrid:
    """The cells of a sheet; without axes, one cell for each result."""

    def __init__(self, table: pa.Table, axes: Sequence[tuple[Axis, Numbers] | None]) -> None:
        self.x, self.y, self.z = (axis[0] if axis else None for axis in axes)
        self._table = table
        self._sizes = [len(axis[0].values) if axis else 1 for axis in axes]
        if not any(axes):
            self._sizes[0] = table.num_rows
            self._places, self._counts = np.arange(table.num_rows), np.ones(table.num_rows, int)
            self._ids = self._places
            return
        ids = np.zeros(table.num_rows, np.int64)
        for axis, size in zip(reversed(axes), reversed(self._sizes), strict=True):
            ids = ids * size + (axis[1] if axis else 0)
        failed = pc.not_equal(table["status"], "completed").to_numpy(zero_copy_only=False)
        order = np.lexsort((failed, ids))
        self._ids, first, self._counts = np.unique(
            ids[order], return_index=True, return_counts=True
        )
        self._places = order[first]
        self._row_ids = ids

    @property
    def is_list(self) -> bool:
        """Whether there are no axes."""
        return not (self.x or self.y or self.z)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of values along x, y and z."""
        return (self._sizes[0], self._sizes[1], self._sizes[2])

    @property
    def num_results(self) -> int:
        """Results in all cells."""
        return int(self._table.num_rows)

    @property
    def num_filled(self) -> int:
        """Cells that have a result."""
        return len(self._ids)

    @property
    def num_ambiguous(self) -> int:
        """Cells that have several results."""
        return int((self._counts > 1).sum())

    @property
    def most_results(self) -> int:
        """Results in the fullest cell."""
        return int(self._counts.max())

    def cell(self, x: int, y: int, z: int) -> Cell | None:
        """Return what is in a cell, None if no result belongs there."""
        wanted = (z * self._sizes[1] + y) * self._sizes[0] + x
        index = int(np.searchsorted(self._ids, wanted))
        if index == len(self._ids) or self._ids[index] != wanted:
            return None
        row = self._table.slice(int(self._places[index]), 1).to_pylist()[0]
        return Cell(row=row, num_results=int(self._counts[index]))

    def picture_shapes(self) -> list[tuple[int, int, str]]:
        """Return each width, height and file ending that a picture here has, by the metadata."""
        table = self._table.filter(pc.equal(self._table["status"], "completed"))
        names = pc.coalesce(table["member"], table["file_name"])
        endings = pc.replace_substring_regex(names, r".*\.", ".")
        table = table.select(["width", "height"]).append_column("ending", endings)
        rows = table.group_by(["width", "height", "ending"]).aggregate([]).to_pylist()
        return [(row["width"], row["height"], row["ending"]) for row in rows if row["width"]]

    def constants(self) -> Row:
        """Return the settings that all results share, but for what the axes show."""
        values = {}
        for name in COMPARED_COLUMNS:
            distinct = self._table[name].unique().drop_null()
            if len(distinct) == 1 and name not in self._axis_names():
                values[name] = distinct[0].as_py()
        return values

    def differing(self) -> list[str]:
        """Return the settings in which results of one cell differ."""
        if not self.num_ambiguous:
            return []
        first = self._places[np.searchsorted(self._ids, self._row_ids)]
        names = []
        for name in COMPARED_COLUMNS:
            codes = _codes(self._table[name])[1]
            if name not in self._axis_names() and (codes != codes[first]).any():
                names.append(name)
        return names

    def _axis_names(self) -> list[str]:
        return [axis.name for axis in (self.x, self.y, self.z) if axis]


def read_grid(
    out_dir: str | Path,
    *,
    x: str | None = None,
    y: str | None = None,
    z: str | None = None,
    limit: int | None = None,
) -> tuple[SheetGrid, int]:
    """Lay the results of a run out by the columns x, y and z.

    Also returns how many rows were left out: bad rows of the manifest that have no value there.
    Raises OutputError if `out_dir` is not a run or has no results, ConfigError for a bad axis.
    """
    names = [name for name in (x, y, z) if name is not None]
    _check_axes(out_dir, names)
    table = read_results(out_dir, [*SHOWN_COLUMNS, *names])
    if limit is not None:
        table = table.slice(0, limit)
    if not table.num_rows:
        raise OutputError(f"{out_dir}: it has no results yet. Render first.")
    placed = _with_values(table, names)
    num_left_out = table.num_rows - placed.num_rows
    axes = [None if name is None else _axis(placed, name) for name in (x, y, z)]
    return SheetGrid(placed, axes), num_left_out


def label(value: Any) -> str:
    """Return a value of an axis as text."""
    if value is None or value == "":
        return "(none)" if value is None else "(empty)"
    if isinstance(value, float):
        return f"{value:.10g}"
    value = plain(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _check_axes(out_dir: str | Path, names: Sequence[str]) -> None:
    known = read_results_schema(out_dir).names
    for name in names:
        if name not in known:
            raise ConfigError(
                f"axis {name!r} is not a column of {out_dir}; {nearest(name, known)}"
                f"known: {', '.join(known)}"
            )
        if names.count(name) > 1:
            raise ConfigError(f"axis {name!r} is given twice. Name another column.")


def _with_values(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """Leave out rows without a request that have no value on an axis.

    A value that is not there is one of an axis where it was asked for so: no negative_prompt.
    """
    for name in names:
        column = table[name]
        if column.null_count == len(column):
            raise ConfigError(f"axis {name!r} is empty: no result has a value there")
        has_place = pc.or_(column.is_valid(), table["request_id"].is_valid())
        table = table.filter(has_place)
    return table


def _axis(table: pa.Table, name: str) -> tuple[Axis, Numbers]:
    """Return the axis of a column and, for each row, the number of its value."""
    values, codes = _codes(table[name])
    order = list(range(len(values)))
    if not any(isinstance(value, str) for value in values):
        order.sort(key=lambda code: (values[code] is None, values[code] or 0))
    else:
        order.sort(key=lambda code: values[code] is None)
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    return Axis(name=name, values=tuple(values[code] for code in order)), ranks[codes]


def _codes(column: pa.ChunkedArray) -> tuple[list[Any], Numbers]:
    """Return the distinct values of a column, by first appearance, and their number in each row."""
    if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
        texts = [None if one is None else label(one) for one in column.to_pylist()]
        column = pa.chunked_array([pa.array(texts, pa.string())])
    encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)
