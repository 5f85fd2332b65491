"""The metadata table as the driver keeps it: which rows have ended, and what became of each
request. A row has ended when its metadata is committed; nothing else counts."""

import ctypes
import time
import warnings
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raydiff.config import OutputConfig
from raydiff.output.atomic import disk_error
from raydiff.output.keys import Keys, num_leading_rows, request_key, request_keys, row_key, row_keys
from raydiff.output.lock import METADATA_DIR, RunLock
from raydiff.output.metadata_schema import (
    RESULT_COLUMNS,
    ROW_COLUMNS,
    build_table,
    metadata_schema,
    result_of,
)
from raydiff.output.part_files import (
    DamagedPartError,
    Part,
    last_sequence,
    list_parts,
    map_parts,
    merge_parts,
    part_name,
    read_columns,
    write_part,
)
from raydiff.output.recovery import drop_rows, recover_parts, set_aside
from raydiff.output.run_file import check_is_run
from raydiff.output.scores import join_scores
from raydiff.output.sorted_index import SortedIndex
from raydiff.output.storage import Storage, open_storage
from raydiff.request import ManifestRow, RenderResult, Status

FANOUT_BITS = 4
FANOUT = 2**FANOUT_BITS
NUM_TIERS = 4
"""Parts of 1, 16, 256 and 4,096 rows and up are merged when there are 16 of a tier."""
FINAL_ROWS = 2 ** (FANOUT_BITS * NUM_TIERS)
"""Parts of this many rows stay as they are: a merge takes under a second."""
NUM_CACHED_ROW_GROUPS = 8
LARGE_TABLE_BYTES = 2**30
TAKE_ROWS = 65_536


class Ledger:
    """The metadata table of one run, opened by the driver that holds its lock.

    Memory is about 24 bytes for each committed row. Image files are not synced when they are
    written; if the machine has restarted since the last session, rows of its last two minutes
    whose file is missing or cut are dropped on opening, and so rendered again.
    """

    def __init__(
        self,
        out: str | Path | Storage,
        *,
        extra_schema: pa.Schema,
        config: OutputConfig,
        lock: RunLock,
    ) -> None:
        """Open or start the table. Raises EngineError without the lock, OutputError, DiskError."""
        lock.check()
        storage = open_storage(out)
        self._folder = storage.folder(METADATA_DIR)
        self._extra_schema = extra_schema
        self._schema = metadata_schema(extra_schema)
        self._config = config
        self._lock = lock
        self._pending: dict[int, tuple[ManifestRow, RenderResult]] = {}
        self._pending_results: dict[str, RenderResult] = {}
        self._oldest_pending_s = 0.0
        self._row_groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self.warnings: list[str] = []
        """What was found wrong on opening, one sentence each."""
        _make_folder(self._folder)
        self._sequence = last_sequence(self._folder, lock.epoch)
        self._open(storage)

    @property
    def counts(self) -> dict[Status, int]:
        """Rows by status, those not yet committed included."""
        return {status: self._counts[status] for status in ("completed", "failed", "quarantined")}

    def __len__(self) -> int:
        return len(self._done) + len(self._pending)

    def is_done(self, row_index: int, image_index: int) -> bool:
        """Return whether this image of this row has ended, in this session or an earlier one."""
        key = row_key(row_index, image_index)
        return key in self._pending or key in self._done

    def num_leading_rows(self) -> int:
        """Return n such that image 0 of rows 0 .. n-1 had ended when the table was opened.

        Where every row asks for one image, the manifest need only be read from row n on.
        """
        return self._num_leading_rows

    def find(self, request_id: str) -> RenderResult | None:
        """Return what became of a request, if a row with it has ended."""
        pending = self._pending_results.get(request_id)
        if pending is not None:
            return pending
        for location in self._requests.find(request_key(request_id)):
            result = self._read_result(location, request_id)
            if result is not None:
                return result
        return None

    def knows(self, request_id: str) -> bool:
        """Return whether a row with this request has ended, by the first 64 bits of its id."""
        key = request_key(request_id)
        return request_id in self._pending_results or key in self._requests

    def add(self, row: ManifestRow, result: RenderResult) -> bool:
        """Take in an ended row, to be committed next. Returns False if it had ended before."""
        if self.is_done(row.row_index, row.image_index):
            return False
        if not self._pending:
            self._oldest_pending_s = time.monotonic()
        self._pending[row_key(row.row_index, row.image_index)] = (row, result)
        if result.request_id:
            self._pending_results[result.request_id] = result
        self._counts[result.status] += 1
        return True

    def should_commit(self, now: float) -> bool:
        """Return whether enough rows wait, or one has waited long enough at time.monotonic()."""
        if not self._pending:
            return False
        age_s = now - self._oldest_pending_s
        return len(self._pending) >= self._config.commit_rows or age_s >= self._config.commit_s

    def commit(self) -> int:
        """Make the rows added so far durable and return their number.

        Raises EngineError if another driver has taken the folder, DiskError if it cannot be
        written; the rows then still wait.
        """
        if not self._pending:
            return 0
        rows = list(self._pending.values())
        table = build_table(rows, self._extra_schema)
        keys = row_keys(table)
        requests, places = request_keys(table["request_id"])
        part = write_part(self._folder, self._next_name(), iter([table]), fence=self._lock.check)
        part_id = self._new_part_id(part)
        self._done.extend(keys)
        self._requests.extend(requests, _locations(part_id, places))
        self._pending.clear()
        self._pending_results.clear()
        while group := self._parts_to_merge():
            self._merge(group)
        _give_back_memory()
        return len(rows)

    def _next_name(self) -> str:
        self._sequence += 1
        return part_name(self._lock.epoch, self._sequence)

    def _open(self, out: Storage) -> None:
        """Index the parts of earlier sessions, once they are free of what a crash left."""
        while True:
            try:
                parts = recover_parts(
                    self._folder,
                    out,
                    self._next_name,
                    self._lock.check,
                    self.warnings,
                    has_sounds=self._config.wav,
                )
                keys = read_row_keys(parts)
                twice = later_doubles(keys, parts)
                if not twice:
                    return self._load(parts, keys)
                num_twice = sum(len(places) for places in twice.values())
                self.warnings.append(f"{num_twice} rows stood twice in the metadata; one was kept.")
                drop_rows(parts, twice, self._next_name, self._lock.check)
            except DamagedPartError as error:
                set_aside(self._folder, error.name, self.warnings)

    def _load(self, parts: list[Part], keys: Keys) -> None:
        self._live = dict(enumerate(parts))
        self._next_part_id = len(parts)
        self._merged_into: dict[int, tuple[int, int]] = {}
        self._done = SortedIndex(keys)
        self._num_leading_rows = num_leading_rows(keys)
        self._counts: Counter[str] = Counter()
        ids = np.empty(len(keys), np.uint64)
        locations = np.empty(len(keys), np.int64)
        size = 0
        for part_id, part in self._live.items():
            table = read_columns(part, ["request_id", "status"])
            self._counts.update(_count_values(table["status"]))
            found, places = request_keys(table["request_id"])
            ids[size : size + len(found)] = found
            locations[size : size + len(found)] = _locations(part_id, places)
            size += len(found)
        self._requests = SortedIndex(ids[:size], locations[:size])

    def _new_part_id(self, part: Part) -> int:
        part_id = self._next_part_id
        self._next_part_id += 1
        self._live[part_id] = part
        return part_id

    def _parts_to_merge(self) -> list[int]:
        """Return parts of one tier that together make one of the next, or none.

        So a row is rewritten at most NUM_TIERS times, and fewer than FANOUT * NUM_TIERS small
        parts are there at a time.
        """
        tiers: list[list[int]] = [[] for _ in range(NUM_TIERS)]
        for part_id, part in self._live.items():
            if part.num_rows < FINAL_ROWS and part.schema.equals(self._schema):
                tiers[_tier(part.num_rows)].append(part_id)
        for tier in tiers:
            num_rows = sum(self._live[part_id].num_rows for part_id in tier)
            if len(tier) >= FANOUT or num_rows >= FINAL_ROWS:
                return tier
        return []

    def _merge(self, part_ids: list[int]) -> None:
        parts = [self._live[part_id] for part_id in part_ids]
        merged = merge_parts(self._next_name(), parts, fence=self._lock.check)
        merged_id = self._new_part_id(merged)
        first_row = 0
        for part_id, part in zip(part_ids, parts, strict=True):
            self._merged_into[part_id] = (merged_id, first_row)
            first_row += part.num_rows
            del self._live[part_id]

    def _read_result(self, location: int, request_id: str) -> RenderResult | None:
        """Return the result at `location`, or None if another request of the same key is there."""
        part_id, row = location >> 32, location & 0xFFFF_FFFF
        while part_id in self._merged_into:
            part_id, first_row = self._merged_into[part_id]
            row += first_row
        starts = self._live[part_id].row_group_starts
        group = bisect_right(starts, row) - 1
        table = self._read_row_group(part_id, group)
        values = table.slice(row - starts[group], 1).to_pylist()[0]
        return result_of(values) if values["request_id"] == request_id else None

    def _read_row_group(self, part_id: int, group: int) -> pa.Table:
        key = (part_id, group)
        if key not in self._row_groups:
            table = read_columns(self._live[part_id], RESULT_COLUMNS, group)
            self._row_groups[key] = table
        self._row_groups.move_to_end(key)
        if len(self._row_groups) > NUM_CACHED_ROW_GROUPS:
            self._row_groups.popitem(last=False)
        return self._row_groups[key]


def _make_folder(folder: Storage) -> None:
    path = folder.local_path("")
    try:
        if path is not None:
            path.mkdir(exist_ok=True)
    except OSError as error:
        raise disk_error(folder.uri, error) from error


def _give_back_memory() -> None:
    """Return freed memory to the system: Arrow keeps what a merge has used, glibc what sorting the
    index has, and a run of days would carry both along."""
    pa.default_memory_pool().release_unused()
    with suppress(AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def read_results(
    out: str | Path | Storage, columns: Sequence[str] | None = None, *, scores: bool = False
) -> pa.Table:
    """Return the metadata of a run, finished or not, sorted by row_index and image_index.

    Some columns take less memory than all; row_index and image_index always come first then.
    With `scores`, the columns that `raydiff score` made come last, request_id being read too.
    Raises OutputError if `out` is not a run. A damaged part is left out, with a warning.
    """
    check_is_run(out)
    if scores:
        wanted = None if columns is None else ["request_id", *columns]
        return join_scores(read_results(out, wanted), out)
    empty = metadata_schema(pa.schema([])).empty_table()
    if columns is not None:
        columns = list(dict.fromkeys([*ROW_COLUMNS, *columns]))
        empty = empty.select([name for name in columns if name in empty.column_names])
    tables, damaged = map_parts(
        open_storage(out).folder(METADATA_DIR), columns, lambda table: table
    )
    for path in damaged:
        warnings.warn(f"{path}: damaged; its rows are left out", stacklevel=2)
    table = pa.concat_tables([empty, *tables], promote_options="default")
    keys = row_keys(table)
    order = np.argsort(keys, kind="stable")
    is_first = np.ones(len(keys), dtype=bool)
    is_first[1:] = np.diff(keys[order]) > 0
    return _take(table, order[is_first]).replace_schema_metadata()


def read_results_schema(out: str | Path | Storage) -> pa.Schema:
    """Return the columns of `read_results`, from the parts' footers alone.

    Raises OutputError if `out` is not a run.
    """
    check_is_run(out)
    parts = list_parts(open_storage(out).folder(METADATA_DIR)).live
    schemas = [metadata_schema(pa.schema([])), *(part.schema for part in parts)]
    return pa.unify_schemas(schemas, promote_options="default")


def _take(table: pa.Table, rows: NDArray[np.int64]) -> pa.Table:
    """Return these rows. Arrow joins a column's chunks for that, which strings with 32-bit
    offsets refuse beyond 2 GiB: a large table goes through 64-bit ones, block by block."""
    if table.nbytes < LARGE_TABLE_BYTES:
        return table.take(pa.array(rows)).combine_chunks()
    wide = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}
    fields = [field.with_type(wide.get(field.type, field.type)) for field in table.schema]
    large = table.cast(pa.schema(fields)).combine_chunks()
    blocks = np.split(rows, range(TAKE_ROWS, len(rows), TAKE_ROWS))
    return pa.concat_tables([large.take(pa.array(one)).cast(table.schema) for one in blocks])


def count_statuses(out: str | Path | Storage) -> Counter[str]:
    """Return the number of committed rows by status. Raises OutputError if it is not a run."""
    check_is_run(out)
    folder = open_storage(out).folder(METADATA_DIR)
    counts, _ = map_parts(folder, ["status"], lambda table: _count_values(table["status"]))
    return sum(counts, Counter())


def read_row_keys(parts: Sequence[Part]) -> Keys:
    """Return the row keys of all parts, in their order. Raises as `read_columns` does."""
    keys = np.empty(sum(part.num_rows for part in parts), np.uint64)
    size = 0
    for part in parts:
        keys[size : size + part.num_rows] = row_keys(
            read_columns(part, ["row_index", "image_index"])
        )
        size += part.num_rows
    return keys


def later_doubles(keys: Keys, parts: Sequence[Part]) -> dict[int, NDArray[np.int64]]:
    """Return, by the part's index, the places of rows that stand in the table before."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    doubles = np.sort(order[1:][ordered[1:] == ordered[:-1]])
    starts = np.cumsum([0, *(part.num_rows for part in parts)])
    owners = np.searchsorted(starts, doubles, side="right") - 1
    return {int(owner): doubles[owners == owner] - starts[owner] for owner in np.unique(owners)}


def _locations(part_id: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
    return places | part_id << 32


def _tier(num_rows: int) -> int:
    return (max(num_rows, 1).bit_length() - 1) // FANOUT_BITS


def _count_values(column: pa.ChunkedArray) -> Counter[str]:
    return Counter({pair["values"]: pair["counts"] for pair in pc.value_counts(column).to_pylist()})
