"""What the commands that read a run's results say beside their output, on standard error."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import click


@contextmanager
def reading(*out_dirs: str) -> Iterator[None]:
    """Say which of these runs is still being written, and show warnings as plain lines.

    Raises OutputError if one is not a run.
    """
    from raydiff.output.progress import read_progress

    for out_dir in out_dirs:
        if read_progress(out_dir).state == "running":
            click.echo(
                f"note: {out_dir} is still being rendered; this is what it has now", err=True
            )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for message in dict.fromkeys(str(warning.message) for warning in caught):
                click.echo(f"warning: {message}", err=True)
