"""SQL over a run's metadata, with DuckDB: the table `results`, read from the parts as needed.

A query sees that table alone: no files, no network, no extensions, no variables of this process.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from pyarrow.fs import LocalFileSystem

from raydiff.errors import ConfigError
from raydiff.output.ledger import FINAL_ROWS, later_doubles, read_results_schema, read_row_keys
from raydiff.output.lock import METADATA_DIR
from raydiff.output.part_files import Part, list_parts, read_columns
from raydiff.output.run_file import check_is_run
from raydiff.output.scores import read_scores, score_names
from raydiff.output.storage import Storage, open_storage

TABLE = "results"
DUCKDB_SETTINGS = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "temp_directory": "",
}
LOCKED_SETTINGS = (
    "SET python_enable_replacements = false",
    "SET TimeZone = 'UTC'",
    "SET lock_configuration = true",
)


@contextmanager
def query_results(out: str | Path | Storage, sql: str) -> Iterator[pa.RecordBatchReader]:
    """Run SQL over the table `results` of a run and give its rows, batch by batch.

    Rows come in the order of their commit unless the query orders them. Raises OutputError if
    `out` is not a run, ConfigError if DuckDB is missing or refuses the query.
    """
    duckdb = _import_duckdb()
    check_is_run(out)
    connection = duckdb.connect(":memory:", config=DUCKDB_SETTINGS)
    try:
        _register(connection, open_storage(out))
        for setting in LOCKED_SETTINGS:
            connection.execute(setting)
        relation = connection.sql(sql)
        if relation is None:
            raise ConfigError(
                f"the query {sql!r} gives no rows. Ask for some: SELECT * FROM {TABLE} LIMIT 5"
            )
        yield relation.to_arrow_reader()
    except (duckdb.Error, pa.ArrowException) as error:
        raise ConfigError(_one_line(str(error))) from None
    finally:
        connection.close()


def _register(connection: Any, out: Storage) -> None:
    """Give the query its table: the metadata, and the columns of the scores there are."""
    names = score_names(out)
    if not names:
        connection.register(TABLE, open_results(out))
        return
    connection.register("rows_without_scores", open_results(out))
    columns, joins = ["rows_without_scores.*"], []
    for name in names:
        scores = read_scores(out, name)
        connection.register(f"score_{name}", scores)
        columns += [f'"score_{name}"."{column}"' for column in scores.column_names[1:]]
        joins.append(
            f'LEFT JOIN "score_{name}" '
            f'ON rows_without_scores.request_id = "score_{name}".request_id'
        )
    connection.execute(
        f"CREATE VIEW {TABLE} AS SELECT {', '.join(columns)} "
        f"FROM rows_without_scores {' '.join(joins)}"
    )


def open_results(out: str | Path | Storage) -> ds.Dataset:
    """Return the rows of a run, each once, as a dataset that reads only what is asked of it.

    It stays whole when a driver at work merges parts: the small ones are held open. A damaged
    part is left out, with a warning.
    """
    while True:
        try:
            return _open_results(open_storage(out))
        except FileNotFoundError:
            continue  # A driver at work merged a part away since it was listed.


def _open_results(out: Storage) -> ds.Dataset:
    schema = read_results_schema(out)
    folder = out.folder(METADATA_DIR)
    listed = list_parts(folder)
    for name in listed.damaged:
        warnings.warn(f"{folder.describe(name)}: damaged; its rows are left out", stacklevel=3)
    parts = listed.live
    doubles = later_doubles(read_row_keys(parts), parts)
    once = [part for index, part in enumerate(parts) if index not in doubles]
    file_format = ds.ParquetFileFormat()
    fragments = [_fragment(part, file_format) for part in once]
    datasets = [ds.FileSystemDataset(fragments, schema, file_format)]
    for index, rows in doubles.items():
        datasets.append(ds.dataset(_without(parts[index], rows, schema)))
    return ds.dataset(datasets, schema=schema)


def _fragment(part: Part, file_format: ds.ParquetFileFormat) -> ds.Fragment:
    path = part.folder.local_path(part.name)
    if path is not None and part.num_rows >= FINAL_ROWS:
        return file_format.make_fragment(str(path), filesystem=LocalFileSystem())
    return file_format.make_fragment(part.folder.open_input(part.name, part.size_bytes))


def _without(part: Part, rows: np.ndarray, schema: pa.Schema) -> pa.Table:
    """Read a part but for the rows at these places, which stand in an earlier one."""
    keep = np.ones(part.num_rows, dtype=bool)
    keep[rows] = False
    table = read_columns(part).filter(pa.array(keep))
    return pa.concat_tables([schema.empty_table(), table], promote_options="default")


def _import_duckdb() -> ModuleType:
    try:
        import duckdb
    except ImportError:
        raise ConfigError(
            'queries need DuckDB, which is not installed. Install it: pip install "raydiff[query]"'
        ) from None
    module: ModuleType = duckdb
    return module


def _one_line(message: str) -> str:
    """Drop DuckDB's picture of the place in the query; keep what it says and suggests."""
    said = message.partition("\nLINE ")[0].splitlines()
    sentences = [line.strip() for line in said if line.strip()]
    return " ".join(line if line[-1] in ".!?:" else f"{line}." for line in sentences)
