"""`raydiff gallery`: a static page to look through a run's results."""

import sys
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from raydiff.output.gallery.build import Refresh

MAX_PROBLEMS = 20


@click.command()
@click.argument("out", type=click.Path())
@click.option(
    "--to", "folder", metavar="FOLDER", help="Where to write it; the default is OUT/gallery."
)
@click.option("--watch", "is_watched", is_flag=True, help="Refresh it until the run has ended.")
def gallery(out: str, folder: str | None, is_watched: bool) -> None:
    """Write a page with the results of OUT: open its index.html in a browser.

    The page needs no server and no network. It links to the images in OUT, so keep, copy or
    upload both together. The same command again adds what is new.

    \b
    raydiff gallery renders
    raydiff gallery renders --watch
    raydiff gallery renders --to site
    """
    from raydiff.output.gallery.build import Gallery

    one = Gallery(out, folder)
    if not is_watched:
        _report(one.refresh(on_progress=_show_progress))
        return
    last = None
    with suppress(KeyboardInterrupt), closing(one.watch()) as watching:
        for last in watching:
            if last.num_made and last.is_running:
                click.echo(f"{last.num_rows:,} results", err=True)
    if last is not None:
        _report(last)


def _show_progress(num_seen: int, num_files: int) -> None:
    if sys.stderr.isatty() and (num_seen % 25 == 0 or num_seen == num_files):
        end = "\n" if num_seen == num_files else ""
        click.echo(f"\r{num_seen:,} of {num_files:,} thumbnails{end}", err=True, nl=False)


def _report(last: "Refresh") -> None:
    for problem in last.problems[:MAX_PROBLEMS]:
        click.echo(problem, err=True)
    if len(last.problems) > MAX_PROBLEMS:
        click.echo(f"... and {len(last.problems) - MAX_PROBLEMS} more", err=True)
    click.echo(f"{last.num_rows:,} results, {last.num_made:,} new thumbnails: {last.page}")
