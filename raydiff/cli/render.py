"""`raydiff render`: a manifest, a job file or single prompts into an output folder."""

import json
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from raydiff.cli.options import run_config, run_options
from raydiff.config import RunConfig
from raydiff.errors import RaydiffError

if TYPE_CHECKING:
    from raydiff.engine.render import RunSummary
    from raydiff.output.failed_rows import FailedRows

SHEET_RESULTS = 100
"""Those that `output.sheet` shows."""


@click.command()
@run_options
@click.option("--strip-metadata", is_flag=True, help="Leave the request out of the image files.")
@click.option("--json", "is_json", is_flag=True, help="Print the summary as one line of JSON.")
def render(
    source: str | None,
    prompts: tuple[str, ...],
    overrides: tuple[str, ...],
    strip_metadata: bool,
    is_json: bool,
    **options: Any,
) -> None:
    """Render SOURCE: a Parquet manifest (file, folder, glob or URI) or a job file (.yaml).

    Images and their metadata go to --out. The same command again continues a run that was
    stopped. Exit status: 0 all rows completed, 1 some failed, 2 the input is bad and nothing was
    rendered, 130 interrupted.

    \b
    raydiff render prompts.parquet --model sdxl --out renders
    raydiff render jobs/demo.yaml
    raydiff render --prompt "a lighthouse at dusk" --model sdxl
    raydiff render prompts.parquet --model sd21 --set defaults.num_inference_steps=30
    """
    if strip_metadata:
        overrides = (*overrides, "output.strip_metadata=true")
    config = run_config(source, prompts, overrides, **options)
    if config.out is None:
        if config.manifest is not None:
            raise click.UsageError("name an output folder: --out FOLDER")
        folder = f"raydiff-out-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
        config = config.model_copy(update={"out": folder})
    run_to_its_end(config, is_json=is_json)


def run_to_its_end(
    config: RunConfig, *, is_json: bool, retry: "FailedRows | None" = None
) -> NoReturn:
    """Render, show how far it is, print the summary and leave with the run's exit status."""
    from raydiff.cli.progress import show_progress
    from raydiff.engine.render import render as run

    sheet = None if config.output.sheet is None else Path(config.output.sheet)
    if sheet is not None:
        from raydiff.output.sheet.file import check_sheet_path

        check_sheet_path(sheet)
    with show_progress(is_quiet=is_json) as progress:
        summary = run(
            config=config, retry=retry, on_progress=progress.update, on_warning=progress.warn
        )
    if is_json:
        click.echo(json.dumps(asdict(summary)))
    else:
        click.echo("\n".join(_describe(summary)))
    if sheet is not None and not summary.is_interrupted:
        _write_sheet(summary.out, sheet, is_quiet=is_json)
    sys.exit(summary.exit_status)


def _write_sheet(out: str, sheet: Path, *, is_quiet: bool) -> None:
    """Show the run's first results; the run is done, so what goes wrong here is but a warning."""
    from raydiff.cli.sheet import write_sheet

    try:
        with redirect_stdout(sys.stderr) if is_quiet else nullcontext():
            write_sheet(out, sheet, limit=SHEET_RESULTS)
    except RaydiffError as error:
        click.echo(f"warning: no contact sheet: {error}", err=True)


def _describe(summary: "RunSummary") -> list[str]:
    from raydiff.engine.summary import describe

    parts = [f"{summary.completed} completed"]
    parts += [
        f"{number} {name}"
        for number, name in (
            (summary.failed, "failed"),
            (summary.quarantined, "quarantined"),
            (summary.duplicates, "duplicates shared"),
        )
        if number
    ]
    rate = summary.ended / summary.elapsed_s if summary.elapsed_s else 0.0
    lines = [
        f"{', '.join(parts)}; {summary.ended} in this session, {summary.elapsed_s:.1f} s, "
        f"{rate:.2f} rows/s. Files and metadata: {summary.out}"
    ]
    if summary.session is not None:
        lines += describe(summary.session)
    if summary.failed or summary.quarantined:
        lines.append("What went wrong is in the metadata's `error` column.")
    if summary.is_interrupted:
        lines.append("Interrupted; the same command continues it.")
    return lines
