"""`raydiff models`: list checkpoints by short name, look into them, download them, make tiny ones
and fp8 copies."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import click

TINY_FAMILIES = ("sd21", "sdxl", "ltx2", "ltx2.3")


@click.group()
def models() -> None:
    """List, inspect, download, quantise or make checkpoints.

    \b
    raydiff models pull sdxl
    raydiff models inspect ~/models/stable-diffusion-xl-base-1.0
    """


@models.command("list")
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
def list_models(is_json: bool) -> None:
    """List the checkpoints that have a short name: published ones and those that ship with raydiff.

    \b
    raydiff models list
    """
    from raydiff.weights.aliases import alias_names, read_alias

    aliases = [read_alias(name) for name in alias_names()]
    if is_json:
        click.echo(json.dumps([asdict(alias) for alias in aliases], indent=2))
        return
    for alias in aliases:
        click.echo(f"{alias.name}: {alias.description}")
        gated = ", to be accepted on the Hub first" if alias.gated else ""
        click.echo(f"  {alias.repo or alias.path} ({alias.licence}{gated})")


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
def make_tiny(family: Literal["sd21", "sdxl", "ltx2", "ltx2.3"], folder: Path, seed: int) -> None:
    """Write a tiny FAMILY pipeline with random weights into FOLDER.

    It has the files and names of the real checkpoint, takes a few megabytes, runs on any CPU, and
    its images or clips are noise.

    \b
    raydiff models make-tiny sd21 tiny-sd21
    raydiff models make-tiny ltx2 tiny-ltx2
    """
    from raydiff.pipelines.tiny import make_tiny as write

    write(family, folder, seed)
    made = "clips" if family.startswith("ltx2") else "images"
    click.echo(f"{folder}: a tiny {family} pipeline with random weights. Its {made} are noise.")


@models.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--out",
    "target",
    type=click.Path(path_type=Path),
    required=True,
    help="What to write: a folder for a folder, a .safetensors file for one.",
)
@click.option(
    "--scales",
    type=click.Choice(["rowwise", "tensorwise"]),
    default="rowwise",
    show_default=True,
    help="One scale for each output of a layer, which is nearer to bf16, or one for the layer.",
)
def quantize(source: Path, target: Path, scales: Literal["rowwise", "tensorwise"]) -> None:
    """Write an fp8 copy of an LTX-2 checkpoint: half the memory of its transformer.

    SOURCE is a pipeline folder or an original single file in bf16. The linear layers of the
    transformer's blocks go to fp8, but for the first and last blocks; all else is as it was, and
    files that do not change are linked where the disk can. It needs one tensor's memory, no GPU.

    \b
    raydiff models quantize ~/models/LTX-2 --out ~/models/LTX-2-fp8
    """
    from raydiff.pipelines.quantize import quantize as write

    report = write(
        source,
        target,
        scales=scales,
        on_progress=_show_progress if sys.stderr.isatty() else None,
    )
    click.echo(
        f"{target}: {report.num_layers:,} layers are in fp8; the transformer takes "
        f"{report.fp8_size_bytes / 1e9:.2f} GB instead of {report.size_bytes / 1e9:.2f} GB"
    )


def _show_progress(num_bytes: int, total_bytes: int) -> None:
    is_done = num_bytes == total_bytes
    text = f"\r{num_bytes / 1e9:.1f} of {total_bytes / 1e9:.1f} GB"
    click.echo(text, nl=is_done, err=True)
