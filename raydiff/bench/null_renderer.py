"""A renderer without a model, to measure what the engine itself costs."""

import time
from collections.abc import Sequence

import numpy as np

from raydiff.engine.worker import RenderedBatch
from raydiff.request import RenderRequest


class NullRenderer:
    """Sleeps `row_ms` for each row and returns random pixels of its seed."""

    def __init__(self, *, row_ms: float) -> None:
        self._row_s = row_ms / 1000

    def start(self) -> str:
        """There is nothing to load."""
        return "cpu"

    def max_batch_size(self, request: RenderRequest) -> int:
        """Any size fits; this one keeps a batch short."""
        return 16

    def render(self, requests: Sequence[RenderRequest]) -> RenderedBatch:
        """Return an image of (height, width) for each request."""
        elapsed_s = self._row_s * len(requests)
        time.sleep(elapsed_s)
        return RenderedBatch(
            pixels=[self._pixels(request) for request in requests],
            warnings=[None] * len(requests),
            encode_s=0.0,
            denoise_s=elapsed_s,
            decode_s=0.0,
            peak_vram_bytes=None,
            profile="cpu_only",
            dtype="float32",
        )

    def _pixels(self, request: RenderRequest) -> np.ndarray:
        rng = np.random.default_rng(request.seed)
        shape = (request.height, request.width, 3)
        return rng.integers(0, 256, shape, dtype=np.uint8)
