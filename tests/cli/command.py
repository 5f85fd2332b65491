"""`raydiff` as a user calls it, for the tests of its commands."""

import os
import subprocess
import sys
from pathlib import Path


def cli(*arguments: str | Path, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run raydiff in a folder and check its exit status."""
    run = subprocess.run(
        [sys.executable, "-m", "raydiff", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"COLUMNS": "100"},
    )
    assert run.returncode == status, run.stdout + run.stderr
    assert "Traceback" not in run.stderr
    return run
