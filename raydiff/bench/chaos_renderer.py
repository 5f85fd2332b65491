"""A renderer for the chaos benchmark: a log of what is rendered, rows that fail, rows that kill."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raydiff.bench.null_renderer import NullRenderer
from raydiff.errors import RowError
from raydiff.request import RenderRequest

BAD = "a bad row"
POISON = "a row that kills its worker"


class ChaosRenderer(NullRenderer):
    """Appends the id of each row that it has denoised to a file that all workers share."""

    def __init__(self, *, log: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._log = Path(log)

    def _sleep(self, requests: Sequence[RenderRequest]) -> float:
        for request in requests:
            if request.prompt.startswith(BAD):
                raise RowError(f"{request.prompt!r} cannot be rendered")
            if request.prompt.startswith(POISON):
                os.kill(os.getpid(), signal.SIGKILL)
        elapsed_s = super()._sleep(requests)
        # One short write at the end of the file: those of other processes do not mix with it.
        with self._log.open("a", buffering=1) as log:
            log.write("".join(f"{request.request_id}\n" for request in requests))
        return elapsed_s
