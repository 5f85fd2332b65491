"""`raydiff export`: a run as a dataset for other libraries."""

import sys
from typing import TYPE_CHECKING, cast

import click

if TYPE_CHECKING:
    from raydiff.output.export.export import ExportFormat

MAX_PROBLEMS = 20


@click.command()
@click.argument("out", type=click.Path())
@click.option(
    "--to",
    "format_",
    type=click.Choice(["webdataset", "imagefolder", "hf-parquet"]),
    required=True,
    help="Tars; a folder of images or videos; Parquet with them inside.",
)
@click.option(
    "--dest",
    type=click.Path(),
    metavar="DIR",
    required=True,
    help="A new or empty folder, or s3://...",
)
@click.option(
    "--columns",
    metavar="NAMES",
    help="Metadata columns, comma-separated; default: all but times, worker and host.",
)
@click.option("--split", metavar="COLUMN", help="A column whose values name the splits.")
@click.option(
    "--shard-rows",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Most samples of a tar.",
)
@click.option(
    "--max-shard-mb",
    type=click.IntRange(min=1),
    default=500,
    show_default=True,
    help="Most megabytes of images in a tar or a Parquet file.",
)
def export(
    out: str,
    format_: str,
    dest: str,
    columns: str | None,
    split: str | None,
    shard_rows: int,
    max_shard_mb: int,
) -> None:
    """Write the completed images and clips of OUT, each once, as a dataset for other libraries.

    Exit status 1 when files were missing or damaged and so left out. An export that was
    interrupted keeps a file _unfinished_export.json; the same command begins it anew.

    \b
    raydiff export renders --to webdataset --dest tars
    raydiff export renders --to imagefolder --dest pictures --split subset
    raydiff export renders --to hf-parquet --dest dataset --columns prompt,seed,guidance_scale
    """
    from raydiff.cli.results import reading
    from raydiff.output.export.export import export_run

    with reading(out):
        summary = export_run(
            out,
            dest,
            to=cast("ExportFormat", format_),
            columns=None if columns is None else [one.strip() for one in columns.split(",")],
            split=split,
            shard_rows=shard_rows,
            max_shard_mb=max_shard_mb,
            on_progress=_show_progress if sys.stderr.isatty() else None,
        )
    for problem in summary.problems[:MAX_PROBLEMS]:
        click.echo(f"left out: {problem}", err=True)
    if len(summary.problems) > MAX_PROBLEMS:
        click.echo(f"... and {len(summary.problems) - MAX_PROBLEMS} more", err=True)
    splits = ", ".join(f"{name} {count:,}" for name, count in sorted(summary.num_samples.items()))
    total = sum(summary.num_samples.values())
    click.echo(f"{total:,} samples ({splits}), {summary.num_bytes / 1e6:,.1f} MB: {dest}")
    sys.exit(1 if summary.problems else 0)


def _show_progress(num_done: int, num_samples: int) -> None:
    end = "\n" if num_done == num_samples else ""
    click.echo(f"\r{num_done:,} of {num_samples:,} samples{end}", err=True, nl=False)
