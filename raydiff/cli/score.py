"""`raydiff score`: a hook over a run's images, its values as columns beside the metadata."""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from raydiff.engine.score import ScoreSummary


@click.command()
@click.argument("out", type=click.Path())
@click.option(
    "--with", "hook", required=True, metavar="MODULE:FUNCTION", help="What is called for each file."
)
@click.option("--name", help="Name of the column, or of its beginning; default: the function's.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="NAME=VALUE",
    help="Argument of the hook, by name; repeatable.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Worker processes; the default is one for each core, up to 8, or for each GPU.",
)
@click.option("--gpu", "use_gpus", is_flag=True, help="Give each worker a GPU of its own.")
@click.option("--retry-errors", is_flag=True, help="Score the files again that had an error.")
@click.option("--json", "is_json", is_flag=True, help="Print the summary as one line of JSON.")
def score(
    out: str,
    hook: str,
    name: str | None,
    overrides: tuple[str, ...],
    workers: int | None,
    use_gpus: bool,
    retry_errors: bool,
    is_json: bool,
) -> None:
    """Call your own function for every image of the run in OUT and keep what it returns.

    It gets (pixels, row): a numpy array, uint8 (H, W, 3), and a dict of the file's metadata, and
    returns a number, a text, a bool, None or a dict of them. A class, or a function without these
    two arguments, is called once in each worker and returns the function: load a model there.

    The same command again scores only what is new. What went wrong for a file is in the column
    NAME_error. `raydiff.read_results(OUT, scores=True)` joins the columns to the metadata. Exit
    status: 0 all scored, 1 some have an error, 2 the input is bad, 130 interrupted.

    \b
    raydiff score renders --with raydiff.score_hooks:sharpness
    raydiff score renders --with my_scores:Aesthetic --set checkpoint=aesthetic.pt --gpu
    raydiff score renders --with my_scores:faces --name faces --workers 4
    """
    from raydiff.cli.progress import count_bar
    from raydiff.cli.results import reading
    from raydiff.config import parse_override
    from raydiff.engine.score import score as run

    with reading(out), count_bar("scoring", is_quiet=is_json) as update:
        summary = run(
            out,
            hook,
            name=name,
            arguments=dict(parse_override(text) for text in overrides),
            workers=workers or "auto",
            use_gpus=use_gpus,
            retry_errors=retry_errors,
            on_progress=update,
            on_warning=lambda message: click.echo(f"warning: {message}", err=True),
        )
    if is_json:
        click.echo(json.dumps(asdict(summary)))
    else:
        _show(summary)
    sys.exit(summary.exit_status)


def _show(summary: "ScoreSummary") -> None:
    import pyarrow.compute as pc

    from raydiff.cli.table import print_table
    from raydiff.output.scores import error_column, read_scores, score_names

    errors = f", {summary.errors:,} of them with an error" if summary.errors else ""
    before = f"; {summary.before:,} had been" if summary.before else ""
    click.echo(
        f"{summary.name}: {summary.scored:,} files scored{errors}{before}; "
        f"{summary.elapsed_s:.1f} s"
    )
    if summary.name in score_names(summary.out):
        table = read_scores(summary.out, summary.name).drop_columns("request_id")
        rows = []
        for column in table.drop_columns(error_column(summary.name)).column_names:
            values = table[column].drop_null()
            numbers = ["", "", ""]
            if len(values) and str(values.type) in ("int64", "double"):
                ends = pc.min_max(values).as_py()
                numbers = [
                    f"{one:.4g}" for one in (ends["min"], pc.mean(values).as_py(), ends["max"])
                ]
            rows.append([column, len(values), *numbers])
        if rows:
            print_table(["column", "values", "min", "mean", "max"], rows)
    if summary.errors:
        click.echo(f"What went wrong is in the column {error_column(summary.name)}.")
    if summary.is_interrupted:
        click.echo("Interrupted; the same command continues it.")
