"""`raydiff models`: look into checkpoints, download them, make tiny ones."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import click

TINY_FAMILIES = ("sd21", "sdxl")


@click.group()
def models() -> None:
    """Inspect, download or make checkpoints.

    \b
    raydiff models pull sdxl
    raydiff models inspect ~/models/stable-diffusion-xl-base-1.0
    """


@models.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
def inspect(path: Path, is_json: bool) -> None:
    """Print family, components, tensors, parameters, bytes and dtypes of PATH.

    Only file headers are read. PATH is a pipeline folder, a component folder or a .safetensors
    file.

    \b
    raydiff models inspect ~/models/stable-diffusion-xl-base-1.0
    """
    from raydiff.weights.inspect import inspect_path

    report = inspect_path(path)
    if is_json:
        click.echo(json.dumps(asdict(report), indent=2))
        return
    click.echo(f"{path}: {report.family or 'no known family'}")
    header = ("component", "tensors", "parameters", "bytes", "dtypes")
    rows = [
        (
            component.name,
            f"{component.num_tensors:,}",
            f"{component.num_parameters:,}",
            f"{component.size_bytes:,}",
            ", ".join(f"{dtype} x {count}" for dtype, count in component.dtypes.items()),
        )
        for component in report.components
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        cells = [
            cell.ljust(width) if i in (0, 4) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())


@models.command()
@click.argument("model")
@click.option("--revision", help="Branch, tag or commit; the default is the repository's.")
@click.option(
    "--variant",
    type=click.Choice(["auto", "fp16", "none"]),
    default="auto",
    help="Weight files to fetch: auto takes fp16 where the repository has it.",
)
def pull(model: str, revision: str | None, variant: Literal["auto", "fp16", "none"]) -> None:
    """Download MODEL (an alias or a Hugging Face id): only the files a render reads.

    \b
    raydiff models pull sdxl
    """
    from raydiff.weights.resolve import resolve_model

    info = resolve_model(model, revision=revision, variant=variant)
    click.echo(f"{info.name} ({info.family}, revision {info.revision}) is at {info.path}")


@models.command("make-tiny")
@click.argument("family", type=click.Choice(TINY_FAMILIES))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Seed of the random weights.")
def make_tiny(family: Literal["sd21", "sdxl"], folder: Path, seed: int) -> None:
    """Write a tiny FAMILY pipeline with random weights into FOLDER.

    It has the files and names of the real checkpoint, takes a megabyte, runs on any CPU, and
    its images are noise.

    \b
    raydiff models make-tiny sd21 tiny-sd21
    """
    from raydiff.pipelines.tiny import make_tiny as write

    write(family, folder, seed)
    click.echo(f"{folder}: a tiny {family} pipeline with random weights. Its images are noise.")
