"""How a run's progress is shown: a bar with rate and ETA on a terminal, plain lines otherwise."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from raydiff.output.progress import Progress

LINE_INTERVAL_S = 10.0


class Display(Protocol):
    """What the engine reports to."""

    def update(self, progress: Progress) -> None:
        """Show how far the run is."""

    def warn(self, message: str) -> None:
        """Show what went wrong and was dealt with."""


@contextmanager
def show_progress(*, is_quiet: bool = False) -> Iterator[Display]:
    """Give a display on standard error: a bar if it is a terminal; only warnings if quiet."""
    console = Console(stderr=True)
    if is_quiet or not console.is_terminal:
        yield LineDisplay(is_quiet=is_quiet)
        return
    bar = RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.fields[total_text]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}"),
        console=console,
    )
    with bar:
        yield BarDisplay(bar)


@contextmanager
def count_bar(doing: str, *, is_quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Give what is told how many are done, and of how many: on a terminal it shows a bar."""
    console = Console(stderr=True)
    is_hidden = is_quiet or not console.is_terminal
    with RichProgress(console=console, transient=True, disable=is_hidden) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda num_done, total: bar.update(task, completed=num_done, total=total)


class BarDisplay:
    """A bar that stays at the bottom of a terminal."""

    def __init__(self, bar: RichProgress) -> None:
        self._bar = bar
        self._task = bar.add_task("starting workers", total=None, total_text="?", detail="")

    def update(self, progress: Progress) -> None:
        """Redraw the bar."""
        self._bar.update(
            self._task,
            description="rendering" if num_ended(progress) else "starting workers",
            completed=num_ended(progress),
            total=progress.total,
            total_text="?" if progress.total is None else str(progress.total),
            detail=describe_rate(progress),
        )

    def warn(self, message: str) -> None:
        """Print above the bar."""
        self._bar.console.print(f"warning: {message}", style="yellow", markup=False)


class LineDisplay:
    """A line now and then, for logs."""

    def __init__(self, *, is_quiet: bool) -> None:
        self._is_quiet = is_quiet
        self._printed_at = time.monotonic()

    def update(self, progress: Progress) -> None:
        """Print a line if the last one is old enough."""
        now = time.monotonic()
        if self._is_quiet or now - self._printed_at < LINE_INTERVAL_S:
            return
        self._printed_at = now
        total = "?" if progress.total is None else progress.total
        line = f"{num_ended(progress)}/{total} rows  {describe_rate(progress)}"
        print(line.rstrip(), file=sys.stderr, flush=True)

    def warn(self, message: str) -> None:
        """Print a line."""
        print(f"warning: {message}", file=sys.stderr, flush=True)


def num_ended(progress: Progress) -> int:
    """Return how many rows have ended, however they did."""
    return progress.done + progress.failed + progress.quarantined


def describe_rate(progress: Progress) -> str:
    """Return rate, time left and failures in words."""
    parts = []
    if progress.rows_per_s:
        parts.append(f"{progress.rows_per_s:.2f} rows/s")
    if progress.eta_s is not None:
        parts.append(f"ETA {describe_seconds(progress.eta_s)}")
    if progress.failed:
        parts.append(f"{progress.failed} failed")
    if progress.quarantined:
        parts.append(f"{progress.quarantined} quarantined")
    return ", ".join(parts)


def describe_seconds(seconds: float) -> str:
    """Return a duration such as `2 h 05 min`, `3 min 20 s`, `12 s`."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"
