"""`raydiff status`: how far a live or finished run is, wherever its driver runs."""

import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from raydiff.output.progress import Progress

WATCH_S = 2.0
SILENCE_S = 30.0
"""A driver writes every second, to an object store every 5."""
COLUMNS = ("worker_id", "role", "state", "node", "device", "pid", "rows")


@click.command()
@click.argument("out", type=click.Path())
@click.option("--watch", is_flag=True, help="Show it again every 2 seconds until the run ends.")
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
def status(out: str, watch: bool, is_json: bool) -> None:
    """Show how far the run in OUT is: rows, rate, ETA, failures, queues, workers.

    OUT may be a folder or a URI of an object store; it is asked, not the driver.

    \b
    raydiff status renders
    raydiff status s3://bucket/renders --watch
    """
    from raydiff.output.progress import read_progress

    if watch:
        _watch(out)
        return
    progress = read_progress(out)
    if is_json:
        click.echo(progress.model_dump_json(indent=2))
        return
    for line in _lines(progress, _failures(out, progress), time.time()):
        click.echo(line)


def _watch(out: str) -> None:
    """Redraw until the run ends or the user has seen enough."""
    from rich.live import Live
    from rich.text import Text

    from raydiff.output.progress import read_progress

    failures: Mapping[str, int] = {}
    num_counted = 0
    with Live(auto_refresh=False) as live:
        try:
            while True:
                progress = read_progress(out)
                if progress.failed + progress.quarantined != num_counted:
                    num_counted = progress.failed + progress.quarantined
                    failures = _failures(out, progress)
                lines = _lines(progress, failures, time.time())
                live.update(Text("\n".join(lines)), refresh=True)
                if progress.state != "running":
                    return
                time.sleep(WATCH_S)
        except KeyboardInterrupt:
            return


def _failures(out: str, progress: "Progress") -> Mapping[str, int]:
    if not progress.failed + progress.quarantined:
        return {}
    from raydiff.engine.failures import count_failures

    return {str(name): count for name, count in count_failures(out).most_common()}


def _lines(progress: "Progress", failures: Mapping[str, int], now: float) -> Iterator[str]:
    from raydiff.cli.progress import describe_rate, num_ended

    total = "?" if progress.total is None else progress.total
    yield (
        f"{progress.state}: {num_ended(progress)} of {total} rows ended, "
        f"{progress.done} completed  {describe_rate(progress)}".rstrip()
    )
    if progress.state == "running":
        yield from _heartbeat(progress, now)
    if failures:
        yield "without an image: " + _counts(failures)
    queues = {name.replace("_", " "): count for name, count in progress.queues.items() if count}
    if queues:
        yield "queues: " + _counts(queues)
    if progress.workers:
        from raydiff.cli.table import table_lines

        names = [name for name in COLUMNS if any(name in one for one in progress.workers)]
        yield from table_lines(
            names, [[one.get(name) for name in names] for one in progress.workers]
        )
    if progress.state in ("stopped", "interrupted"):
        yield "The same render command continues it."


def _heartbeat(progress: "Progress", now: float) -> Iterator[str]:
    """Say who drives the run, and when it was last heard of."""
    from raydiff.cli.progress import describe_seconds

    if progress.updated_at is None or progress.started_at is None:
        return
    since = datetime.fromtimestamp(progress.started_at, UTC).strftime("%Y-%m-%d %H:%M UTC")
    age_s = max(now - progress.updated_at, 0.0)
    driver = f"driver: process {progress.pid} on {progress.host} since {since}"
    if age_s < SILENCE_S:
        yield f"{driver}, heard of {describe_seconds(age_s)} ago"
    else:
        yield driver
        yield (
            f"no news for {describe_seconds(age_s)}: the driver hangs, its storage does, or its "
            "clock is another"
        )


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())
