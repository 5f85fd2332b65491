"""`raydiff sweep`: prompts times templates, settings and seeds into a manifest."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import click

from raydiff.errors import ConfigError

PREVIEW_ROWS = 3


@click.command()
@click.argument("source", type=click.Path(), required=False)
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Instead of SOURCE.")
@click.option(
    "--template",
    "templates",
    multiple=True,
    metavar="TEXT",
    help="Prompt with {fields}, {choices|between|texts} and __wildcards__; repeatable.",
)
@click.option("--wildcards", metavar="DIR", help="Folder with NAME.txt for each __NAME__.")
@click.option(
    "--choices",
    type=click.Choice(["all", "random"]),
    default="all",
    show_default=True,
    help="Every text of a template, or one by chance in each row.",
)
@click.option(
    "--grid",
    multiple=True,
    metavar="COLUMN=VALUES",
    help="Values of a column or template field: 3,5,7.5; repeatable.",
)
@click.option("--seeds", help="0-9, 0-90:10 or 1,2,30-39.")
@click.option(
    "--mode",
    type=click.Choice(["cartesian", "zip", "random"]),
    default="cartesian",
    show_default=True,
    help="Every combination, axes side by side, or a sample.",
)
@click.option("--samples", type=click.IntRange(min=1), help="Rows of --mode random.")
@click.option(
    "--random-seed", type=click.IntRange(0, 2**63 - 1), default=0, help="For all that is random."
)
@click.option(
    "--max-rows",
    type=click.IntRange(min=1),
    default=1_000_000,
    show_default=True,
    help="Refuse to make more.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Manifest to write.")
@click.option(
    "--rows-per-file",
    type=click.IntRange(min=1),
    default=1_000_000,
    show_default=True,
    help="With more rows than this, OUT is a folder of part files.",
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--dry-run", is_flag=True, help="Count and show the first rows; write nothing.")
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
def sweep(
    source: str | None,
    prompts: tuple[str, ...],
    templates: tuple[str, ...],
    wildcards: str | None,
    choices: Literal["all", "random"],
    grid: tuple[str, ...],
    seeds: str | None,
    mode: Literal["cartesian", "zip", "random"],
    samples: int | None,
    random_seed: int,
    max_rows: int,
    out: Path | None,
    rows_per_file: int,
    force: bool,
    dry_run: bool,
    is_json: bool,
) -> None:
    """Make a manifest: every prompt of SOURCE with every template, setting and seed.

    SOURCE is .txt (a prompt a line), .csv, .tsv (quotes are text), .jsonl or Parquet; its other
    columns are kept. The last axis changes fastest. In templates, {name} is a column of SOURCE
    or a --grid axis; \\{ is a plain brace. A value in --grid is a number, text, "text, with a
    comma", null (the default), or in whole-number columns a range such as 20-50:10.

    \b
    raydiff sweep prompts.txt --seeds 0-9 --grid guidance_scale=3,5,7.5 --out manifest.parquet
    raydiff sweep --template "a {colour} {cat|dog}" --grid colour=red,black --dry-run
    raydiff sweep prompts.csv --template "{prompt}, __style__" --wildcards styles --out m.parquet
    raydiff sweep prompts.txt --seeds 0-999 --mode random --samples 500 --dry-run
    """
    from raydiff.config import SweepConfig
    from raydiff.manifest.sweep import open_sweep
    from raydiff.manifest.writer import check_target, write_manifest

    if out is None and not dry_run:
        raise click.UsageError("name the manifest to write: --out manifest.parquet (or --dry-run)")
    if out is not None and not dry_run:
        check_target(out, is_forced=force)
    config = SweepConfig(
        template=templates,
        wildcards=wildcards,
        choices=choices,
        grid=_grid(grid),
        seeds=seeds,
        mode=mode,
        samples=samples,
        random_seed=random_seed,
        max_rows=max_rows,
    )
    manifest = open_sweep(config, source=source, prompts=prompts)
    report: dict[str, Any] = {
        "num_rows": manifest.num_rows,
        "mode": mode,
        "axes": [asdict(axis) for axis in manifest.axes],
        "columns": manifest.schema.names,
        "fingerprint": manifest.fingerprint,
    }
    if not is_json:
        echo_axes(manifest.axes)
        click.echo(f"{manifest.num_rows:,} rows ({mode}): {', '.join(manifest.schema.names)}")
    if dry_run or out is None:
        _, batch = next(manifest.batches())
        report["first_rows"] = batch.slice(0, PREVIEW_ROWS).to_pylist()
        for row in [] if is_json else report["first_rows"]:
            click.echo("  " + json.dumps(row, ensure_ascii=False, default=str))
    else:
        written = write_manifest(manifest, out, rows_per_file=rows_per_file, is_forced=force)
        report["written"] = asdict(written)
        if not is_json:
            files = f"{written.num_files:,} files in " if written.num_files > 1 else ""
            click.echo(f"wrote {files}{written.path}, {written.size_bytes:,} bytes")
    if is_json:
        click.echo(json.dumps(report, default=str))


def echo_axes(axes: tuple[Any, ...]) -> None:
    """Print a sweep's axes, one a line."""
    width = max((len(axis.name) for axis in axes), default=0)
    for axis in axes:
        click.echo(f"{axis.name:<{width}}  {axis.num_values:>9,}  {axis.values}")


def _grid(texts: tuple[str, ...]) -> dict[str, str]:
    """Split each COLUMN=VALUES."""
    grid: dict[str, str] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ConfigError(f"--grid {text}: expected COLUMN=VALUES, e.g. guidance_scale=3,5,7.5")
        if name in grid:
            raise ConfigError(
                f"axis {name} is there twice. Put its values together: --grid {name}="
                f"{grid[name]},{values}"
            )
        grid[name] = values
    return grid
