"""`raydiff sheet`: labelled contact sheets of a run's images and videos."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from PIL import Image

    from raydiff.output.sheet.grid import SheetGrid
    from raydiff.output.sheet.sheet import Sheet

MAX_THREADS = 8
CELL = 256
FRAMES = 4


@click.command()
@click.argument("out", type=click.Path())
@click.option("--x", metavar="COLUMN", help="Metadata column whose values go from left to right.")
@click.option("--y", metavar="COLUMN", help="Column whose values go from top to bottom.")
@click.option("--z", metavar="COLUMN", help="Column with a page, or pages, for each value.")
@click.option(
    "--out",
    "to",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("sheet.png"),
    show_default=True,
    help="A .png (several pages become sheet-01.png, ...) or a .pdf.",
)
@click.option(
    "--cell",
    type=click.IntRange(32, 4096),
    default=CELL,
    show_default=True,
    help="Longer side of a picture in pixels.",
)
@click.option(
    "--frames",
    type=click.IntRange(1, 64),
    default=FRAMES,
    show_default=True,
    help="Frames of a video, from its first to its last.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N results, by row.")
def sheet(
    out: str,
    x: str | None,
    y: str | None,
    z: str | None,
    to: Path,
    cell: int,
    frames: int,
    limit: int | None,
) -> None:
    """Lay the results of the run in OUT out on labelled pages, by any columns of its metadata.

    Without axes, every result gets a picture with a caption. Where several results belong in one
    cell, the first completed one by row is shown, with their number. Failed rows show their error.

    \b
    raydiff sheet renders --x seed --y guidance_scale
    raydiff sheet renders --x seed --y prompt --z sampler --out sheet.pdf
    raydiff sheet renders --limit 100 --cell 160
    """
    write_sheet(out, to, x=x, y=y, z=z, cell=cell, frames=frames, limit=limit)


def write_sheet(
    out: str,
    to: Path,
    *,
    x: str | None = None,
    y: str | None = None,
    z: str | None = None,
    cell: int = CELL,
    frames: int = FRAMES,
    limit: int | None = None,
) -> None:
    """Do what the command does with these options, and say what the sheet has and lacks."""
    from raydiff.cli.results import reading
    from raydiff.output.sheet.file import check_sheet_path, write_pages
    from raydiff.output.sheet.grid import read_grid
    from raydiff.output.sheet.sheet import Sheet

    check_sheet_path(to)
    with reading(out):
        grid, num_left_out = read_grid(out, x=x, y=y, z=z, limit=limit)
        pages = Sheet(out, grid, cell_size=cell, num_frames=frames, num_threads=_num_threads())
        files = list(write_pages(to, _with_bar(pages), len(pages)))
    click.echo(_describe(grid, pages, files))
    for note in _notes(grid, pages, num_left_out):
        click.echo(f"note: {note}", err=True)


def _num_threads() -> int:
    return min(len(os.sched_getaffinity(0)), MAX_THREADS)


def _with_bar(sheet: "Sheet") -> Iterator["Image.Image"]:
    """Yield the pages; on a terminal, show how many there are."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        yield from bar.track(sheet, total=len(sheet), description="pages")


def _describe(grid: "SheetGrid", sheet: "Sheet", files: list[Path]) -> str:
    names = str(files[0]) if len(files) == 1 else f"{files[0]} to {files[-1]}"
    pages = "1 page" if len(sheet) == 1 else f"{len(sheet)} pages"
    (nx, ny, nz), num = grid.shape, grid.num_results
    cells = f"{nx:,} x {ny:,} cells" + (f" for each of {nz:,}" if nz > 1 else "")
    return f"{names}: {pages}, " + (f"{num:,} results" if grid.is_list else cells)


def _notes(grid: "SheetGrid", sheet: "Sheet", num_left_out: int) -> Iterator[str]:
    """Say what the sheet does not show."""
    if grid.num_ambiguous:
        differing = grid.differing()
        remedy = f" They differ in {', '.join(differing)}: make that an axis." if differing else ""
        yield (
            f"cells with several results: {grid.num_ambiguous:,} (up to {grid.most_results:,}); "
            f"the first completed one by row is shown.{remedy}"
        )
    for problem, count in sorted(sheet.problems.items()):
        yield f"cells without a picture, {problem}: {count:,}"
    if num_left_out:
        yield f"bad rows without values on the axes, left out: {num_left_out:,}"
    if sheet.missing_characters:
        shown = "".join(sorted(sheet.missing_characters)[:10])
        yield f"no font here has {shown}: install one, e.g. Noto Sans CJK (fonts-noto-cjk)"
