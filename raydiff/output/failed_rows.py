"""Rows of a run that did not complete: found, and taken out of the metadata so that the run, when
it goes on, makes them again."""

from dataclasses import dataclass
from itertools import count

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raydiff.output.keys import row_keys
from raydiff.output.lock import METADATA_DIR
from raydiff.output.part_files import (
    DamagedPartError,
    last_sequence,
    list_parts,
    map_parts,
    part_name,
    read_columns,
)
from raydiff.output.recovery import drop_rows
from raydiff.output.run_file import Run, check_is_run
from raydiff.output.storage import open_storage
from raydiff.request import Status

COLUMNS = ("row_index", "image_index", "status", "error")


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedRows:
    """Which of the rows that did not complete are meant."""

    statuses: tuple[Status, ...] = ("failed",)
    matching: str = ""
    """Text that their error contains, in any case."""

    def among(self, table: pa.Table) -> NDArray[np.bool_]:
        """Return which rows of a table with status and error are meant."""
        wanted = pc.is_in(table["status"], pa.array(self.statuses))
        if self.matching:
            error = pc.fill_null(table["error"], "")
            wanted = pc.and_(wanted, pc.match_substring(error, self.matching, ignore_case=True))
        is_wanted: NDArray[np.bool_] = wanted.to_numpy()
        return is_wanted


def find_failed_rows(out: str, wanted: FailedRows) -> pa.Table:
    """Return row_index, image_index, status and error of such rows, in order.

    Raises OutputError if `out` is not a run.
    """
    check_is_run(out)
    tables, _ = map_parts(
        open_storage(out).folder(METADATA_DIR),
        COLUMNS,
        lambda table: table.filter(pa.array(wanted.among(table))),
    )
    if not tables:
        return pa.table({name: [] for name in COLUMNS})
    found = pa.concat_tables(tables)
    _, first = np.unique(row_keys(found), return_index=True)
    return found.take(pa.array(first))


def drop_failed_rows(run: Run, wanted: FailedRows) -> int:
    """Take such rows out of the metadata and return how many; they count as not done from here.

    Part by part: a crash leaves each part as it was, or without them. Raises DiskError, and
    EngineError if another driver has taken the folder.
    """
    folder = run.storage.folder(METADATA_DIR)
    epoch = run.lock.epoch
    sequence = count(last_sequence(folder, epoch) + 1)
    parts = list_parts(folder).live
    places = {}
    for index, part in enumerate(parts):
        try:
            rows = np.flatnonzero(wanted.among(read_columns(part, ("status", "error"))))
        except DamagedPartError:
            continue  # The ledger sets it aside when it is opened.
        if len(rows):
            places[index] = rows
    drop_rows(parts, places, lambda: part_name(epoch, next(sequence)), run.lock.check)
    return sum(len(rows) for rows in places.values())
