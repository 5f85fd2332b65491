"""`raydiff plan`: what a run would do, without torch, without Ray, without writing."""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from raydiff.cli.options import run_config, run_options
from raydiff.cli.sweep import echo_axes

if TYPE_CHECKING:
    from raydiff.engine.plan import PlannedBatches, PlanReport


@click.command()
@run_options
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
def plan(
    source: str | None,
    prompts: tuple[str, ...],
    overrides: tuple[str, ...],
    is_json: bool,
    **options: Any,
) -> None:
    """Check every row of SOURCE and say what `render` would do with it.

    Rows, duplicates, bad rows with what is wrong, batches, and what --out already has. Exit
    status 1 when a row is bad.

    \b
    raydiff plan prompts.parquet --model sdxl --out renders
    """
    from raydiff.engine.plan import plan as make_plan

    report = make_plan(run_config(source, prompts, overrides, **options))
    if is_json:
        click.echo(json.dumps(asdict(report), indent=2))
    else:
        echo_axes(report.axes)
        click.echo(
            f"{report.num_rows} rows, {report.num_images} {_kinds(report)}: {report.num_distinct} "
            f"distinct requests, {report.num_duplicates} duplicates, {report.num_bad} bad"
        )
        click.echo(f"{report.num_done} done, {report.num_new} to render")
        for batch in report.batches:
            click.echo(describe_batches(batch))
        for message in report.bad_rows:
            click.echo(message, err=True)
        if report.num_bad > len(report.bad_rows):
            click.echo(f"... and {report.num_bad - len(report.bad_rows)} more bad rows", err=True)
    sys.exit(1 if report.num_bad else 0)


def describe_batches(batches: "PlannedBatches") -> str:
    """Say in one line what shares batches, and how many there are."""
    clip = ""
    if batches.num_frames is not None:
        clip = f", {batches.num_frames} frames at {batches.frame_rate:g}/s"
    return (
        f"{batches.num_batches} batches of up to {batches.batch_size}: {batches.num_requests} x "
        f"{batches.model} {batches.width}x{batches.height}{clip}, profile {batches.profile}"
    )


def _kinds(report: "PlanReport") -> str:
    kinds = {"images" if one.num_frames is None else "clips" for one in report.batches}
    return " and ".join(sorted(kinds, reverse=True)) or "images"
