"""Waiting for a run that another process drives."""

import subprocess
import time
from pathlib import Path

from raydiff.output.ledger import read_results
from raydiff.output.run_file import is_run


def wait_for_rows(
    driver: "subprocess.Popen[bytes]",
    out: str | Path,
    count: int,
    *,
    patience_s: float = 120.0,
    every_s: float = 0.1,
) -> None:
    """Wait until a run has so many results; its driver is to live until then."""
    until = time.monotonic() + patience_s
    while not is_run(out) or read_results(out).num_rows < count:
        assert driver.poll() is None
        assert time.monotonic() < until
        time.sleep(every_s)
