"""`raydiff diff`: which requests differ between two runs, and by how much."""

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from heapq import nsmallest
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from raydiff.output.diff import Difference, RunDiff

MAX_THREADS = 8


@click.command()
@click.argument("out1", type=click.Path())
@click.argument("out2", type=click.Path())
@click.option(
    "--on",
    default="request_id",
    show_default=True,
    metavar="COLUMNS",
    help="Columns that rows are matched by, e.g. prompt,seed for two models or settings.",
)
@click.option(
    "--top",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="Differences to show, the worst first.",
)
@click.option(
    "--to",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write all differences to this .parquet, .csv or .json file, the worst first.",
)
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
def diff(out1: str, out2: str, on: str, top: int, to: Path | None, is_json: bool) -> None:
    """Compare the images and videos of two runs: largest difference, PSNR (dB) and SSIM.

    Exit status: 0 all is equal, 1 something differs, 2 the input is bad. Requests that failed in
    both runs count as equal. Files whose sha256 in the metadata are equal are not read again:
    `raydiff verify` checks those.

    \b
    raydiff diff renders renders-bf16
    raydiff diff renders other-model --on prompt,seed --to differences.parquet
    """
    from raydiff.cli.results import reading
    from raydiff.output.diff import RunDiff, difference_table
    from raydiff.output.rows_file import format_of, write_rows

    format_ = format_of(to) if to is not None else None
    names = [name for part in on.split(",") if (name := part.strip())]
    if not names:
        raise click.UsageError("--on: name at least one column, e.g. --on prompt,seed")
    with reading(out1, out2):
        run_diff = RunDiff(out1, out2, on=names, num_threads=_num_threads())
        found = _with_bar(run_diff)
        if to is not None and format_ is not None:
            worst = sorted(found, key=_rank)
            write_rows(to, format_, difference_table(worst, names).to_reader())
        else:
            worst = nsmallest(top, found, key=_rank)  # only these are kept
    if is_json:
        click.echo(json.dumps(_summary(run_diff, worst[:top]), indent=2, ensure_ascii=False))
    else:
        _show(run_diff, worst[:top], out1, out2)
    sys.exit(0 if run_diff.is_same else 1)


def _rank(difference: "Difference") -> tuple[int, float, int]:
    return difference.rank


def _with_bar(run_diff: "RunDiff") -> Iterator["Difference"]:
    """Yield the differences; on a terminal, show how many requests are done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("comparing", total=run_diff.num_pairs)
        for difference in run_diff:
            bar.update(task, completed=run_diff.counts.total())
            yield difference


def _num_threads() -> int:
    return min(len(os.sched_getaffinity(0)), MAX_THREADS)


def _summary(run_diff: "RunDiff", worst: "Sequence[Difference]") -> dict[str, Any]:
    from raydiff.output.rows_file import plain

    found = run_diff.similarities
    ssims = [one.ssim for one in found if one.ssim is not None]
    return {
        "on": list(run_diff.on),
        "pairs": run_diff.num_pairs,
        "counts": dict(run_diff.counts),
        "left_out": dict(zip(("left", "right"), run_diff.num_without_key, strict=True)),
        "max_abs": max((one.max_abs for one in found), default=0),
        "psnr": _lowest_and_median([one.psnr for one in found]),
        "ssim": _lowest_and_median(ssims),
        "worst": [plain(asdict(difference)) for difference in worst],
    }


def _lowest_and_median(values: list[float]) -> dict[str, float] | None:
    finite = [value for value in values if math.isfinite(value)]
    return {"lowest": min(finite), "median": median(finite)} if finite else None


def _show(run_diff: "RunDiff", worst: "Sequence[Difference]", left: str, right: str) -> None:
    counts = run_diff.counts
    outcomes = [
        f"{count:,} {outcome.replace('_', ' ')}"
        for outcome, count in counts.items()
        if not outcome.startswith("only")
    ]
    click.echo(f"{run_diff.num_pairs:,} in both: {', '.join(outcomes) or 'nothing to compare'}")
    if not run_diff.num_pairs:
        click.echo("Other models or settings make other requests: match them with --on prompt,seed")
    num_alone = (counts["only_left"], counts["only_right"])
    for name, alone, left_out in zip(
        (left, right), num_alone, run_diff.num_without_key, strict=True
    ):
        if alone:
            click.echo(f"{alone:,} only in {name}")
        if left_out:
            click.echo(f"{left_out:,} without {' and '.join(run_diff.on)} in {name}: left out")
    summary = _summary(run_diff, [])
    for name, unit in (("psnr", " dB"), ("ssim", "")):
        if summary[name]:
            lowest, middle = (f"{summary[name][key]:.4g}{unit}" for key in ("lowest", "median"))
            click.echo(f"{name.upper()} of those that differ: lowest {lowest}, median {middle}")
    _print_worst(worst, left, right)


def _print_worst(worst: "Sequence[Difference]", left: str, right: str) -> None:
    from raydiff.cli.table import print_table, printable

    for one in worst:
        if one.outcome.startswith("only"):
            name, row = (right, one.right_row) if one.left_row is None else (left, one.left_row)
            click.echo(f"only in {name}: row {row}: {_key_text(one)}")
        elif one.similarity is None:
            text = printable(one.message)
            click.echo(f"{one.outcome.replace('_', ' ')}: row {one.left_row}: {text}")
    rows = []
    for one in worst:
        if one.similarity is not None:
            ssim = "" if one.similarity.ssim is None else f"{one.similarity.ssim:.4f}"
            psnr = f"{one.similarity.psnr:.2f}"
            metrics = (one.similarity.max_abs, psnr, ssim)
            request = _key_text(one) + (f"; {one.message}" if one.message else "")
            rows.append([one.left_row, one.right_row, *metrics, request])
    if rows:
        click.echo()
        print_table(["row", "row", "max abs", "PSNR", "SSIM", "request"], rows)


def _key_text(difference: "Difference") -> str:
    """Return what the rows were matched by; for a request_id, the file, which can be looked at."""
    from raydiff.cli.table import clipped, printable

    if list(difference.key) == ["request_id"]:
        file_name = difference.left_file or difference.right_file
        return file_name or str(difference.key["request_id"])
    values = {name: clipped(printable(value), 32) for name, value in difference.key.items()}
    return ", ".join(f"{name} {value}" for name, value in values.items())
