"""`raydiff verify`: is every file that the metadata names there and unchanged?"""

import json
import re
import sys
from dataclasses import asdict

import click


def sample_size(
    context: click.Context, option: click.Parameter, value: str | None
) -> tuple[float, int] | None:
    """Read a share of all images (`1%`) or a number of them (`20`) as (share, number)."""
    if value is None:
        return None
    percent = re.fullmatch(r"(\d+(?:\.\d+)?)%", value)
    if percent and 0 < float(percent[1]) <= 100:
        return float(percent[1]) / 100, 1
    if re.fullmatch(r"\d+", value) and int(value) > 0:
        return 0.0, int(value)
    raise click.BadParameter(f"{value!r}: give a share such as 1% or a number such as 20")


@click.command()
@click.argument("out", type=click.Path())
@click.option(
    "--rerender",
    "sample",
    metavar="SIZE",
    callback=sample_size,
    help="Also render some images or clips again: 1%, or 20.",
)
@click.option("--seed", default=0, show_default=True, help="Which ones --rerender takes.")
@click.option("--json", "is_json", is_flag=True, help="Print one JSON object per problem.")
def verify(out: str, sample: tuple[float, int] | None, seed: int, is_json: bool) -> None:
    """Check that every completed row of OUT has its file, with the size and sha256 it had.

    With --rerender, render a sample again from the metadata and compare. Exit status 1 when
    something is wrong: an image rendered again may be 1 grey level off, as on another GPU, and a
    clip so far that its PSNR is 30 dB.
    Files that no row names are listed, and are no error.

    \b
    raydiff verify renders
    raydiff verify renders --rerender 1%
    """
    from raydiff.output.verify import Verification

    verification = Verification(out)
    num_errors = 0
    for problem in verification:
        num_errors += problem.is_error
        click.echo(json.dumps(asdict(problem)) if is_json else str(problem.message))
    if not is_json:
        click.echo(
            f"{verification.num_rows} rows, {verification.num_files} files checked: "
            + ("all is well" if not num_errors else f"{num_errors} problems")
        )
    if sample is not None:
        num_errors += _rerender(out, *sample, seed, is_json)
    sys.exit(1 if num_errors else 0)


def _rerender(out: str, share: float, number: int, seed: int, is_json: bool) -> int:
    """Render a sample again, say what is not equal, and return how many are other images."""
    from raydiff.cli.reproduce import describe_rerendered, rerendered_values
    from raydiff.engine.rerender import MAX_GREY_LEVELS, MIN_FRAMES_PSNR, Rerenderer
    from raydiff.output.row_samples import sample_requests

    renderer = Rerenderer(out)
    num_rows = num_near = num_different = 0
    for batch in sample_requests(out, share=share, number=number, seed=seed).to_batches(64):
        for row in batch.to_pylist():
            made = renderer.render(row)
            num_rows += 1
            if made.is_equal:
                continue
            num_near += made.is_near
            num_different += not made.is_near
            if is_json:
                kind = "near_render" if made.is_near else "different_render"
                click.echo(json.dumps({"kind": kind, **rerendered_values(made)}))
            else:
                click.echo(describe_rerendered(made))
    if not is_json:
        click.echo(
            f"{num_rows} rendered again: {num_rows - num_near - num_different} equal byte for "
            f"byte, {num_near} within {MAX_GREY_LEVELS} grey level (clips {MIN_FRAMES_PSNR:g} dB), "
            f"{num_different} different"
        )
    return num_different
