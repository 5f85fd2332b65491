"""Completed rows of a run, picked by their request or by chance."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydiff.errors import OutputError
from raydiff.output.keys import Keys, request_keys
from raydiff.output.lock import METADATA_DIR
from raydiff.output.media_files import MEDIA_COLUMNS
from raydiff.output.metadata_schema import REQUEST_COLUMNS, VIDEO_COLUMNS, metadata_schema
from raydiff.output.part_files import map_parts
from raydiff.output.run_file import check_is_run
from raydiff.output.storage import open_storage

COLUMNS = (
    *("row_index", "image_index", "request_id", "status", "error", "sha256", *MEDIA_COLUMNS),
    *(*REQUEST_COLUMNS, *VIDEO_COLUMNS, "profile", "dtype", "batch_size", "device", "num_threads"),
    "raydiff_version",
)
"""What it takes to make a row's image or clip again."""
ORDER = ("model", "profile", "dtype", "batch_size", "request_id")
"""Rows that can be made by one loaded model come together."""


def find_request(out: str | Path, request_id: str) -> dict[str, object]:
    """Return COLUMNS of the first row of a request, named by its id or by its beginning.

    Raises OutputError if `out` is not a run, or has no such request or several.
    """
    check_is_run(out)
    tables, _ = map_parts(
        open_storage(out).folder(METADATA_DIR),
        COLUMNS,
        lambda table: table.filter(
            pc.starts_with(pc.fill_null(table["request_id"], ""), request_id.lower())
        ),
    )
    rows = _joined(tables).sort_by([("row_index", "ascending"), ("image_index", "ascending")])
    found = pc.unique(rows["request_id"]).to_pylist()
    if len(found) != 1:
        what = "no request begins so" if not found else f"{len(found)} requests begin so"
        raise OutputError(
            f"{out}: request {request_id!r}: {what}. Take the id from the metadata's `request_id` "
            "column, or from the file's name."
        )
    row: dict[str, object] = rows.slice(0, 1).to_pylist()[0]
    return row


def sample_requests(out: str | Path, *, share: float, number: int, seed: int) -> pa.Table:
    """Return COLUMNS of a row of each of `number` completed requests, or of a `share` (0..1) of
    them if that is more; the same ones for the same `seed`.

    Raises OutputError if `out` is not a run.
    """
    check_is_run(out)
    folder = open_storage(out).folder(METADATA_DIR)
    keys, _ = map_parts(folder, ["request_id", "status"], _completed_keys)
    requests = np.unique(np.concatenate([np.empty(0, np.uint64), *keys]))
    size = min(len(requests), max(number, math.ceil(share * len(requests))))
    chosen = np.random.default_rng(seed).choice(requests, size, replace=False)

    def pick(table: pa.Table) -> pa.Table:
        table = table.filter(pc.equal(table["status"], "completed"))
        return table.filter(pa.array(np.isin(request_keys(table["request_id"])[0], chosen)))

    tables, _ = map_parts(folder, COLUMNS, pick)
    rows = _joined(tables)
    _, first = np.unique(request_keys(rows["request_id"])[0], return_index=True)
    return rows.take(pa.array(first)).sort_by([(name, "ascending") for name in ORDER])


def _completed_keys(table: pa.Table) -> Keys:
    return request_keys(table.filter(pc.equal(table["status"], "completed"))["request_id"])[0]


def _joined(tables: list[pa.Table]) -> pa.Table:
    empty = metadata_schema(pa.schema([])).empty_table().select(COLUMNS)
    return pa.concat_tables([empty, *tables], promote_options="default")
