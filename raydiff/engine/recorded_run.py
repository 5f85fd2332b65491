"""A run as its own run.json has it: the settings to go on with it, or to make its rows again."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raydiff.config import RunConfig, load_config
from raydiff.output.lock import METADATA_DIR
from raydiff.output.part_files import map_parts
from raydiff.output.run_file import read_run
from raydiff.output.storage import open_storage


def recorded_config(out: str | Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Return the settings that the run in `out` was started with, `overrides` laid over them.

    `limit` is raised to the last row that has ended: later sessions may have gone further.
    Raises OutputError if `out` is not a run, ConfigError for overrides that cannot be.
    """
    values: dict[str, Any] = {}
    for key, value in read_run(out).config.items():
        if isinstance(value, dict):
            values |= {f"{key}.{inner}": one for inner, one in value.items()}
        else:
            values[key] = value
    if values.get("limit") is not None:
        values["limit"] = max(values["limit"], _num_ended_rows(out))
    return load_config(None, {**values, **(overrides or {}), "out": str(out)})


def _num_ended_rows(out: str | Path) -> int:
    """Return how many of the manifest's rows there are up to the last one that has ended."""
    folder = open_storage(out).folder(METADATA_DIR)
    ends, _ = map_parts(folder, ["row_index"], _end)
    return max(ends, default=0)


def _end(table: pa.Table) -> int:
    last: int | None = pc.max(table["row_index"]).as_py()
    return 0 if last is None else last + 1
