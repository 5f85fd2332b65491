"""Run a manifest whose Ray loses its head after some rows; exit status 3 if that is told so.

python lose_head.py MANIFEST OUT LOG
"""

import sys
from pathlib import Path

import psutil
from drive import drive

from raydiff.engine import cluster
from raydiff.errors import EngineError
from raydiff.output.progress import Progress


def kill_head(progress: Progress) -> None:
    if progress.done >= 20:
        for process in psutil.Process().children():
            if process.name() == "gcs_server":
                process.kill()


if __name__ == "__main__":
    cluster.SILENCE_S = 4.0
    manifest, out, log = map(Path, sys.argv[1:])
    try:
        drive(manifest, out, log, row_ms=80, on_progress=kill_head)
    except EngineError as error:
        print(error)
        sys.exit(3)
