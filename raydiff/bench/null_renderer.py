"""A renderer without a model, to measure what the engine itself costs."""

import time
from collections.abc import Mapping, Sequence

import numpy as np

from raydiff.engine.messages import Role, TextKey
from raydiff.engine.renderer import DenoisedBatch, EncodedTexts, Payload
from raydiff.output.rendered import Rendered
from raydiff.request import RenderRequest

EMBEDS_SHAPE = (77, 768)
LATENTS_SHAPE = (4, 32, 32)
"""Of float32: 240 KB for each text and 16 KB for each row, as SD 2.1 at 256x256 has."""


class NullRenderer:
    """Sleeps `row_ms` for each row, where it is denoised, and returns random pixels of its seed."""

    def __init__(self, *, row_ms: float, role: Role = "fused") -> None:
        self._row_s = row_ms / 1000

    def start(self) -> str:
        """There is nothing to load."""
        return "cpu"

    def max_batch_size(self, request: RenderRequest) -> int:
        """Any size fits; this one keeps a batch short."""
        return 16

    def render(self, requests: Sequence[RenderRequest]) -> Rendered:
        """Return an image of (height, width) for each request."""
        elapsed_s = self._sleep(requests)
        return self._rendered(requests, elapsed_s)

    def encode(self, texts: Sequence[TextKey]) -> EncodedTexts:
        """Return as many bytes as a text encoder would."""
        return EncodedTexts([np.zeros(EMBEDS_SHAPE, np.float32) for _ in texts], 0)

    def render_encoded(
        self, requests: Sequence[RenderRequest], embeds: Mapping[TextKey, Payload]
    ) -> Rendered:
        """As `render`."""
        return self.render(requests)

    def denoise(
        self, requests: Sequence[RenderRequest], embeds: Mapping[TextKey, Payload]
    ) -> DenoisedBatch:
        """Return as many bytes as a UNet would."""
        return DenoisedBatch(
            latents=[np.zeros(LATENTS_SHAPE, np.float32) for _ in requests],
            warnings=[None] * len(requests),
            errors=[None] * len(requests),
            encode_s=0.0,
            denoise_s=self._sleep(requests),
            peak_vram_bytes=None,
            profile="cpu_only",
            dtype="float32",
        )

    def decode(self, requests: Sequence[RenderRequest], latents: Sequence[Payload]) -> Rendered:
        """Return the images that `render` returns."""
        return self._rendered(requests, 0.0)

    def step_down(self) -> None:
        """There is no memory to give."""

    def _sleep(self, requests: Sequence[RenderRequest]) -> float:
        elapsed_s = self._row_s * len(requests)
        time.sleep(elapsed_s)
        return elapsed_s

    def _rendered(self, requests: Sequence[RenderRequest], denoise_s: float) -> Rendered:
        return Rendered(
            pixels=[self._pixels(request) for request in requests],
            audio=[None] * len(requests),
            warnings=[None] * len(requests),
            errors=[None] * len(requests),
            encode_s=0.0,
            denoise_s=denoise_s,
            decode_s=0.0,
            peak_vram_bytes=None,
            profile="cpu_only",
            dtype="float32",
        )

    def _pixels(self, request: RenderRequest) -> np.ndarray:
        rng = np.random.default_rng(request.seed)
        shape = (request.height, request.width, 3)
        return rng.integers(0, 256, shape, dtype=np.uint8)
