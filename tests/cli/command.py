"""`raydiff` as a user calls it, for the tests of its commands."""

import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

from click.testing import CliRunner, Result

from raydiff.cli import main


def cli(*arguments: str | Path, cwd: Path, status: int = 0) -> Result:
    """Run raydiff in a folder and check its exit status.

    It runs in this process, which has by now what each call would import anew; the README's
    commands run in processes of their own.
    """
    with chdir(cwd), _as_it_was(cwd):
        result = CliRunner().invoke(
            main, [str(one) for one in arguments], env={"COLUMNS": "100"}, catch_exceptions=False
        )
    assert result.exit_code == status, result.stdout + result.stderr
    return result


@contextmanager
def _as_it_was(cwd: Path) -> Iterator[None]:
    """Undo what a command changes for its whole process: where hooks of a folder are imported
    from, and torch's threads, of which images that are made again have their run's number."""
    path = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = path
        for name, module in list(sys.modules.items()):
            if (getattr(module, "__file__", None) or "").startswith(f"{cwd}/"):
                del sys.modules[name]
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)
