"""Whether the workers of other machines see the output folder that the driver sees."""

import platform
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raydiff.errors import EngineError
from raydiff.output.atomic import disk_error

PREFIX = ".visible-"
PATIENCE_S = 10.0
"""For network file systems that show a new file late."""
STEP_S = 0.2


@contextmanager
def visible_mark(out_dir: Path) -> Iterator[Path]:
    """Put a file of a new name into the folder while a run goes on. Raises DiskError."""
    for stale in out_dir.glob(f"{PREFIX}*"):
        stale.unlink(missing_ok=True)
    mark = out_dir / f"{PREFIX}{secrets.token_hex(8)}"
    try:
        mark.touch()
    except OSError as error:
        raise disk_error(mark, error) from error
    try:
        yield mark
    finally:
        with suppress(OSError):
            mark.unlink(missing_ok=True)


def check_mark(mark: Path) -> None:
    """Raise EngineError if the mark is not seen from here."""
    until = time.monotonic() + PATIENCE_S
    while not mark.exists():
        if time.monotonic() >= until:
            raise EngineError(
                f"output folder {mark.parent}: node {platform.node()} does not see the driver's. "
                "Use a folder that all nodes share, or an object store (s3://bucket/run)."
            )
        time.sleep(STEP_S)
