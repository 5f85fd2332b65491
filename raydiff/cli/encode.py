"""`raydiff encode`: the texts of a manifest, encoded ahead of its run."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from raydiff.cli.options import LIMIT, MODEL, PROMPT, SET, SOURCE, run_config, with_options

if TYPE_CHECKING:
    from raydiff.engine.encode_texts import EncodeSummary


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    out = click.option("--out", help="Folder of encoded texts; the job's ltx2.embeds if left out.")
    return with_options(command, [SOURCE, PROMPT, MODEL, out, LIMIT, SET])


@click.command()
@_options
@click.option("--json", "is_json", is_flag=True, help="Print the summary as one line of JSON.")
def encode(
    source: str | None,
    prompts: tuple[str, ...],
    overrides: tuple[str, ...],
    out: str | None,
    is_json: bool,
    **options: Any,
) -> None:
    """Encode each text that the rows of SOURCE need, once, with the model's text encoder.

    SOURCE is a manifest or a job file, as for `render`. A run of LTX-2 that reads --out needs no
    text encoder: --set ltx2.text_encoder=precomputed --set ltx2.embeds=FOLDER. A split run with
    engine.embeds_on_disk takes them from its own --out. The same command again encodes only what is
    missing. Exit status: 0 all is there, 1 some rows are bad, 2 the
    input is bad, 130 interrupted.

    \b
    raydiff encode prompts.parquet --model Lightricks/LTX-2 --out texts
    raydiff encode prompts.parquet --model sdxl --out renders
    """
    config = run_config(source, prompts, overrides, **options)
    out = out or config.ltx2.embeds
    if out is None:
        raise click.UsageError("name a folder for the encoded texts: --out FOLDER")

    from raydiff.cli.progress import count_bar
    from raydiff.engine.encode_texts import encode_texts

    with count_bar("encoding", is_quiet=is_json) as update:
        summary = encode_texts(config, out, on_progress=update)
    if is_json:
        click.echo(json.dumps(asdict(summary)))
    else:
        _show(summary)
    sys.exit(summary.exit_status)


def _show(summary: "EncodeSummary") -> None:
    before = f", {summary.num_kept:,} were there" if summary.num_kept else ""
    click.echo(
        f"{summary.num_texts:,} texts: {summary.num_encoded:,} encoded{before}; "
        f"{summary.elapsed_s:.1f} s. They are in {summary.out}"
    )
    for message in summary.bad_rows:
        click.echo(message, err=True)
    if summary.num_bad > len(summary.bad_rows):
        click.echo(f"... and {summary.num_bad - len(summary.bad_rows)} more bad rows", err=True)
    if summary.is_interrupted:
        click.echo("Interrupted; the same command continues it.")
