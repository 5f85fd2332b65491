"""`raydiff query`: SQL over a run's metadata."""

import sys
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

if TYPE_CHECKING:
    import pyarrow as pa

    from raydiff.output.rows_file import RowsFormat


@click.command()
@click.argument("out", type=click.Path())
@click.argument("sql")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["table", "csv", "json", "parquet"]),
    help="Default: what --to ends in; else a table on a terminal, CSV in a pipe.",
)
@click.option(
    "--to", type=click.Path(path_type=Path, dir_okay=False), help="Write all rows to this file."
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Most rows of a table.",
)
def query(out: str, sql: str, format_: str | None, to: Path | None, limit: int) -> None:
    """Run SQL (DuckDB's) over the metadata of the run in OUT: the table `results`.

    `DESCRIBE results` names its columns, your own included. Needs DuckDB: pip install
    "raydiff[query]". A query reads that table and nothing else: no files, no network.

    \b
    raydiff query renders "DESCRIBE results"
    raydiff query renders "SELECT sampler, count(*), avg(denoise_s) FROM results GROUP BY sampler"
    raydiff query renders "SELECT * FROM results WHERE status = 'failed'" --to failed.parquet
    """
    from raydiff.cli.results import reading
    from raydiff.errors import ConfigError
    from raydiff.output.query import query_results
    from raydiff.output.rows_file import format_of, print_rows, write_rows

    if to is None and format_ == "parquet":
        raise ConfigError("--format parquet: name a file for it: --to rows.parquet")
    if to is not None and format_ == "table":
        raise ConfigError(f"--to {to}: a table is for the terminal; files are csv, json or parquet")
    if to is not None and format_ is None:
        format_ = format_of(to)
    with reading(out), query_results(out, sql) as reader:
        if to is not None:
            num_rows = write_rows(to, cast("RowsFormat", format_), reader)
            click.echo(f"{num_rows:,} rows written to {to}", err=True)
        elif format_ == "table" or (format_ is None and sys.stdout.isatty()):
            _show(reader, limit)
        else:
            print_rows(sys.stdout, "json" if format_ == "json" else "csv", reader)


def _show(reader: "pa.RecordBatchReader", limit: int) -> None:
    from raydiff.cli.table import print_table

    rows = chain.from_iterable(
        zip(*(column.to_pylist() for column in batch.columns), strict=True) for batch in reader
    )
    shown = list(islice(rows, limit))
    print_table(reader.schema.names, shown)
    if next(rows, None) is not None:
        click.echo(f"The first {limit} rows; --limit N shows more, --to FILE writes all.", err=True)
    else:
        click.echo(f"{len(shown)} rows" if len(shown) != 1 else "1 row", err=True)
