"""A renderer for the engine's tests: what a row's prompt says is what happens to it."""

import ctypes
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from raydiff.engine.worker import RenderedBatch
from raydiff.errors import EngineError, OutOfMemoryError
from raydiff.request import RenderRequest


class FaultyRenderer:
    """Renders noise; a prompt with `raise`, `die`, `crash` or `lose the GPU` fails in that way.

    log: file that gets a line for each row that is rendered: request_id, process, batch size,
    and the GPUs that CUDA would show.
    max_rows: more rows in a batch are out of memory. row_ms: milliseconds that a row takes.
    """

    def __init__(self, *, log: str, row_ms: float = 1, max_rows: int = 8) -> None:
        self._log = Path(log)
        self._row_ms = row_ms
        self._max_rows = max_rows

    def start(self) -> str:
        return "cpu"

    def max_batch_size(self, request: RenderRequest) -> int:
        return 8

    def render(self, requests: Sequence[RenderRequest]) -> RenderedBatch:
        for request in requests:
            self._fail(request.prompt)
        if len(requests) > self._max_rows:
            raise OutOfMemoryError(f"{len(requests)} rows do not fit")
        elapsed_s = self._row_ms / 1000 * len(requests)
        time.sleep(elapsed_s)
        about = f"{os.getpid()} {len(requests)} gpus={os.environ.get('CUDA_VISIBLE_DEVICES')}"
        with self._log.open("a") as log:
            log.writelines(f"{request.request_id} {about}\n" for request in requests)
        return RenderedBatch(
            pixels=[self._pixels(request) for request in requests],
            warnings=["cut" if "long" in request.prompt else None for request in requests],
            encode_s=0.0,
            denoise_s=elapsed_s,
            decode_s=0.0,
            peak_vram_bytes=None,
            profile="cpu_only",
            dtype="float32",
        )

    def _fail(self, prompt: str) -> None:
        if "raise" in prompt:
            raise ValueError(f"cannot render {prompt!r}")
        if "lose the GPU" in prompt:
            raise EngineError("the GPU failed")
        if "die" in prompt:
            os.kill(os.getpid(), signal.SIGKILL)
        if "crash" in prompt:
            ctypes.string_at(0)

    def _pixels(self, request: RenderRequest) -> np.ndarray:
        rng = np.random.default_rng(request.seed)
        return rng.integers(0, 256, (request.height, request.width, 3), dtype=np.uint8)


class UnstartableRenderer:
    """Fails to load, every time."""

    def __init__(self, **arguments: object) -> None:
        pass

    def start(self) -> str:
        raise RuntimeError("no such device")
