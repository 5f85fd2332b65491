"""`raydiff verify`: is every file that the metadata names there and unchanged?"""

import json
import sys
from dataclasses import asdict

import click


@click.command()
@click.argument("out", type=click.Path())
@click.option("--json", "is_json", is_flag=True, help="Print one JSON object per problem.")
def verify(out: str, is_json: bool) -> None:
    """Check that every completed row of OUT has its file, with the size and sha256 it had.

    Exit status 1 when something is wrong. Files that no row names are listed, and are no error.

    \b
    raydiff verify renders
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
    sys.exit(1 if num_errors else 0)
