"""OUT/scores/<name>/part-*.parquet: what a hook said of each file of a run, to join to its rows.

There is one row for each request_id: the hook's values in columns, or the error that kept it from
giving any. Parts are written and merged like the metadata's; of rows that stand twice the later
one holds.
"""

import json
import re
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydiff.errors import ConfigError, OutputError, RowError
from raydiff.output.atomic import disk_error
from raydiff.output.keys import Keys, request_keys
from raydiff.output.lock import RunLock
from raydiff.output.part_files import (
    Part,
    last_sequence,
    list_parts,
    map_parts,
    part_name,
    read_columns,
    remove_parts,
    write_part,
)
from raydiff.output.recovery import remove_temporary_parts, set_aside
from raydiff.output.run_file import check_is_run
from raydiff.output.storage import Storage, open_storage, read_error

SCORES_DIR = "scores"
SCORE_FILE = "score.json"
NAME = re.compile(r"[A-Za-z_]\w{0,63}", re.ASCII)
KEY = re.compile(r"\w{1,64}")
COMMIT_S = 5.0
"""Longest time that a score waits to be committed."""
COMMIT_ROWS = 5000
MAX_PARTS = 64
"""Parts are joined to one when there are so many."""
MAX_INT = 2**63 - 1

Value = bool | int | float | str | None
TYPES = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
NUMBERS = {pa.int64(), pa.float64()}


@dataclass(frozen=True, kw_only=True, slots=True)
class FileScore:
    """What a hook gave for one file: values by column, or an error."""

    request_id: str
    values: Mapping[str, Value] = field(default_factory=dict)
    error: str | None = None


def error_column(name: str) -> str:
    """Return the column that says why a file has no score."""
    return f"{name}_error"


def columns_of(name: str, returned: Any) -> dict[str, Value]:
    """Return what a hook returned as values by column: `name`, or `name_key` of a dict.

    Numbers may be numpy's or tensors of one element. Raises RowError for what is not a value.
    """
    if not isinstance(returned, Mapping):
        return {name: _value(name, returned)}
    if not returned:
        raise RowError("the hook returned an empty dict; give it at least one value")
    for key in returned:
        if not isinstance(key, str) or not KEY.fullmatch(key) or key == "error":
            raise RowError(
                f"the hook returned a dict with the key {key!r:.100}; use letters, digits and _, "
                "but not error, which is raydiff's own"
            )
    return {f"{name}_{key}": _value(key, value) for key, value in returned.items()}


def _value(key: str, returned: Any) -> Value:
    if getattr(returned, "ndim", None) == 0 and hasattr(returned, "item"):
        returned = returned.item()
    if returned is not None and type(returned) not in TYPES:
        raise RowError(
            f"{key}: the hook returned {type(returned).__name__}; it may return float, int, str, "
            "bool, None or a dict of those"
        )
    if isinstance(returned, int) and not -MAX_INT <= returned <= MAX_INT:
        raise RowError(f"{key}: the hook returned an int beyond 64 bits; return a float")
    value: Value = _printable(returned) if isinstance(returned, str) else returned
    return value


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


# -- reading ---------------------------------------------------------------------------------------


def score_names(out: str | Path | Storage) -> list[str]:
    """Return the names that a run has scores under. Raises OutputError if it is not a run."""
    check_is_run(out)
    folder = open_storage(out).folder(SCORES_DIR)
    try:
        return [name for name in folder.list_names() if folder.size(f"{name}/{SCORE_FILE}")]
    except OSError as error:
        raise read_error(folder.uri, error) from None


def read_scores(out: str | Path | Storage, name: str) -> pa.Table:
    """Return request_id, the columns of a score and its error column, a row for each file.

    Raises OutputError if `out` is not a run, ConfigError if it has no such score.
    """
    known = score_names(out)
    if name not in known:
        raise ConfigError(
            f"{open_storage(out).uri}: no score {name!r}; it has {', '.join(known) or 'none'}. "
            f"Make one: raydiff score {open_storage(out).uri} --with module:function --name {name}"
        )
    folder = open_storage(out).folder(f"{SCORES_DIR}/{name}")
    tables, damaged = map_parts(folder, None, lambda table: table)
    for path in damaged:
        warnings.warn(f"{path}: damaged; its scores are left out", stacklevel=2)
    schema = _joint_schema((table.schema for table in tables), name)
    table = pa.concat_tables([schema.empty_table(), *(_conform(one, schema) for one in tables)])
    keys, _ = request_keys(table["request_id"])
    _, last = np.unique(keys[::-1], return_index=True)
    return table.take(pa.array(np.sort(len(keys) - 1 - last))).combine_chunks()


def join_scores(results: pa.Table, out: str | Path | Storage) -> pa.Table:
    """Append the columns of every score of a run to rows with a request_id, null where none is."""
    for name in score_names(out):
        scores = read_scores(out, name)
        places = pc.index_in(results["request_id"], value_set=scores["request_id"])
        for column in scores.column_names[1:]:
            results = results.append_column(column, scores[column].take(places))
    return results


def _joint_schema(schemas: Iterable[pa.Schema], name: str) -> pa.Schema:
    """Return the columns of all parts; where some hold integers and others floats, floats."""
    types: dict[str, pa.DataType] = {}
    for schema in schemas:
        for one in schema:
            if types.setdefault(one.name, one.type) != one.type:
                types[one.name] = pa.float64()
    return _schema(name, types)


def _schema(name: str, types: Mapping[str, pa.DataType]) -> pa.Schema:
    ends = {"request_id": pa.string(), error_column(name): pa.string()}
    values = [(column, type_) for column, type_ in types.items() if column not in ends]
    (first, last) = ends.items()
    return pa.schema([first, *values, last])


def _conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = [
        table[one.name].cast(one.type, safe=False)
        if one.name in table.column_names
        else pa.nulls(table.num_rows, one.type)
        for one in schema
    ]
    return pa.table(columns, schema=schema)


# -- writing ---------------------------------------------------------------------------------------


class ScoreTable:
    """The scores of one name, opened by the one process that adds to them."""

    def __init__(
        self, out: str | Path | Storage, name: str, *, hook: str, arguments: dict[str, Any]
    ):
        """Take the folder. Raises OutputError if it is another process's or another hook's."""
        self._name = name
        self._out = open_storage(out)
        self._folder = self._out.folder(f"{SCORES_DIR}/{name}")
        self._made_by = {"hook": hook, "arguments": arguments}
        self._has_score_file = False
        self._pending: list[FileScore] = []
        self._oldest_pending_s = 0.0
        self.num_errors = 0
        """Files of this session without a score."""
        self.warnings: list[str] = []
        _make_folder(self._folder)
        self._lock = RunLock(self._folder).acquire()
        try:
            self._check_hook()
            self._parts = self._recover()
        except BaseException:
            self._lock.release()
            raise
        self._sequence = last_sequence(self._folder, self._lock.epoch)
        schema = _joint_schema((part.schema for part in self._parts), name)
        self._types = {one.name: one.type for one in schema}

    def done(self, *, with_errors: bool) -> Keys:
        """Return the request keys that have a score, or also those that have an error."""
        if not self._parts:
            return np.empty(0, np.uint64)
        table = read_scores(self._out, self._name)
        if not with_errors:
            table = table.filter(pc.is_null(table[error_column(self._name)]))
        return request_keys(table["request_id"])[0]

    def add(self, score: FileScore) -> None:
        """Take in a score; a value of another type than the column has becomes an error."""
        if not self._pending:
            self._oldest_pending_s = time.monotonic()
        checked = self._checked(score)
        self.num_errors += checked.error is not None
        self._pending.append(checked)

    def should_commit(self, now: float) -> bool:
        """Return whether enough scores wait, or one has waited long enough."""
        age_s = now - self._oldest_pending_s
        return bool(self._pending) and (len(self._pending) >= COMMIT_ROWS or age_s >= COMMIT_S)

    def commit(self) -> None:
        """Make the scores added so far durable. Raises EngineError, DiskError."""
        if not self._pending:
            return
        self._lock.check()
        self._write_score_file()
        schema = _schema(self._name, self._types)
        error = error_column(self._name)
        rows = [
            {"request_id": one.request_id, error: one.error, **one.values} for one in self._pending
        ]
        columns = [pa.array([row.get(one.name) for row in rows], one.type) for one in schema]
        tables = iter([pa.table(columns, schema=schema)])
        part = write_part(self._folder, self._next_name(), tables, fence=self._lock.check)
        self._parts.append(part)
        self._pending.clear()
        if len(self._parts) >= MAX_PARTS:
            self._merge()

    def close(self) -> None:
        """Give the folder back."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_hook(self) -> None:
        try:
            made_by = json.loads(self._folder.read(SCORE_FILE))
        except FileNotFoundError:
            return
        except OSError as error:
            raise read_error(self._folder.describe(SCORE_FILE), error) from None
        except ValueError as error:
            uri = self._folder.describe(SCORE_FILE)
            raise OutputError(f"{uri}: cannot be read: {error}") from None
        self._has_score_file = True
        if made_by != self._made_by:
            raise OutputError(
                f"{self._folder.uri}: these scores are of {_describe(made_by)}, not of "
                f"{_describe(self._made_by)}. Choose another --name, or remove that folder."
            )

    def _write_score_file(self) -> None:
        if self._has_score_file:
            return
        try:
            self._folder.put(SCORE_FILE, json.dumps(self._made_by, indent=2).encode())
        except OSError as error:
            raise disk_error(self._folder.describe(SCORE_FILE), error) from error
        self._has_score_file = True

    def _recover(self) -> list[Part]:
        """Return the parts, once the folder is free of what a crash left."""
        remove_temporary_parts(self._folder)
        listed = list_parts(self._folder)
        remove_parts(self._folder, listed.replaced)
        for name in listed.damaged:
            set_aside(self._folder, name, [])
            uri = self._folder.describe(name)
            self.warnings.append(f"{uri}: damaged; the files in it are scored again")
        return list(listed.live)

    def _checked(self, score: FileScore) -> FileScore:
        types = dict(self._types)
        for column, value in score.values.items():
            if value is None:
                continue
            type_ = TYPES[type(value)]
            known = types.setdefault(column, type_)
            if {known, type_} == NUMBERS:
                types[column] = pa.float64()
            elif known != type_:
                error = f"{column}: the hook returned {type_} here, and {known} for other files"
                return FileScore(request_id=score.request_id, error=error)
        self._types = types
        return score

    def _next_name(self) -> str:
        self._sequence += 1
        return part_name(self._lock.epoch, self._sequence)

    def _merge(self) -> None:
        schema = _joint_schema((part.schema for part in self._parts), self._name)
        tables = (_conform(read_columns(part), schema) for part in self._parts)
        merged = write_part(
            self._folder, self._next_name(), tables, replaces=self._parts, fence=self._lock.check
        )
        remove_parts(self._folder, (part.name for part in self._parts))
        self._parts = [merged]


def _make_folder(folder: Storage) -> None:
    path = folder.local_path("")
    try:
        if path is not None:
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be made: {error.strerror}") from None


def _describe(made_by: Any) -> str:
    """Write hook and arguments as the command line has them."""
    if not isinstance(made_by, dict) or not isinstance(made_by.get("arguments"), dict):
        return repr(made_by)
    options = [f"--set {key}={value}" for key, value in made_by["arguments"].items()]
    return " ".join([f"--with {made_by.get('hook')}", *options])
