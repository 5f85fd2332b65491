"""`raydiff retry-failed`: make a run's failed rows again."""

import json
from collections import Counter
from typing import Any

import click
import pyarrow as pa

from raydiff.config import parse_override

MAX_SHOWN = 20


@click.command()
@click.argument("out", type=click.Path())
@click.option("--quarantined", is_flag=True, help="Also rows whose workers died.")
@click.option("--matching", metavar="TEXT", default="", help="Only rows whose error has TEXT.")
@click.option("--dry-run", is_flag=True, help="List them, change nothing.")
@click.option("--manifest", type=click.Path(), help="Where the run's manifest is now, if it moved.")
@click.option("--model", type=click.Path(), help="Where the run's model is now, if it moved.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any setting that the run may change, e.g. memory.profile=gpu_poor; repeatable.",
)
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
def retry_failed(
    out: str,
    quarantined: bool,
    matching: str,
    dry_run: bool,
    manifest: str | None,
    model: str | None,
    overrides: tuple[str, ...],
    is_json: bool,
) -> None:
    """Render the failed rows of the run in OUT again, then whatever is left of the run.

    With the manifest and the settings that OUT/run.json names; run it where the run was started.
    Their metadata is dropped first: a row that is not reached again counts as not done. Exit
    status as of `raydiff render`.

    \b
    raydiff retry-failed renders --dry-run
    raydiff retry-failed renders --matching "out of memory" --set memory.profile=gpu_poor
    """
    from raydiff.output.failed_rows import FailedRows, find_failed_rows

    wanted = FailedRows(
        statuses=("failed", "quarantined") if quarantined else ("failed",), matching=matching
    )
    if dry_run:
        _print_rows(find_failed_rows(out, wanted), is_json)
        return

    from raydiff.cli.render import run_to_its_end
    from raydiff.engine.recorded_run import recorded_config

    given = {"manifest": manifest, "model.name": model}
    values: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    values |= dict(parse_override(text) for text in overrides)
    run_to_its_end(recorded_config(out, values), is_json=is_json, retry=wanted)


def _print_rows(rows: pa.Table, is_json: bool) -> None:
    if is_json:
        click.echo(json.dumps(rows.to_pylist()))
        return
    for row in rows.slice(0, MAX_SHOWN).to_pylist():
        image = f", image {row['image_index']}" if row["image_index"] else ""
        click.echo(f"row {row['row_index']}{image}: {row['status']}: {row['error']}")
    if len(rows) > MAX_SHOWN:
        click.echo(f"... and {len(rows) - MAX_SHOWN:,} more")
    counts = Counter(rows["status"].to_pylist())
    total = ", ".join(f"{count:,} {status}" for status, count in counts.items())
    click.echo(f"{total or 'no such rows'}; they are made again without --dry-run")
