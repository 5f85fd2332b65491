"""`raydiff status`: how far a live or finished run is."""

import click


@click.command()
@click.argument("out", type=click.Path())
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
def status(out: str, is_json: bool) -> None:
    """Show how far the run in OUT is: rows, rate, ETA, workers.

    \b
    raydiff status renders
    """
    from raydiff.cli.progress import describe_rate, num_ended
    from raydiff.output.progress import read_progress

    progress = read_progress(out)
    if is_json:
        click.echo(progress.model_dump_json(indent=2))
        return
    total = "?" if progress.total is None else progress.total
    click.echo(
        f"{progress.state}: {num_ended(progress)} of {total} rows ended, "
        f"{progress.done} completed  {describe_rate(progress)}".rstrip()
    )
    for worker in progress.workers:
        click.echo("  " + ", ".join(f"{key} {value}" for key, value in worker.items()))
    if progress.state in ("stopped", "interrupted"):
        click.echo("The same render command continues it.")
