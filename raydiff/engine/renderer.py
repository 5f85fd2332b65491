"""What a worker renders with: the interface of a renderer, and what its stages return.

A worker calls it from one thread. Embeddings and latents are the renderer's own kind of object:
the engine only counts their bytes and carries them from one worker to another.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from raydiff.engine.messages import TextKey
from raydiff.output.rendered import Rendered
from raydiff.request import RenderRequest


class Payload(Protocol):
    """One text's embeddings or one row's latents: anything in host memory that can be pickled."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in a store."""


class EncodedTexts(NamedTuple):
    """The embeddings of each text, in their order."""

    embeds: Sequence[Payload]
    num_from_disk: int
    warning: str | None = None
    """What people should be told."""


class DenoisedBatch(NamedTuple):
    """The latents of one batch and what they cost. Seconds are the whole batch's."""

    latents: Sequence[Payload]
    """One per request."""
    warnings: Sequence[str | None]
    errors: Sequence[str | None]
    """Why a request's latents are of no use; None where they are."""
    encode_s: float
    denoise_s: float
    peak_vram_bytes: int | None
    profile: str
    dtype: str


class Renderer(Protocol):
    """Makes pixels. A worker builds it with its role and calls it from one thread only.

    In every stage OutOfMemoryError asks for a smaller batch; EngineError says that this process
    can render no more; any other error is blamed on the requests.
    """

    def start(self) -> str:
        """Load what the first batch needs and return the device's name."""

    def max_batch_size(self, request: RenderRequest) -> int:
        """Return how many requests of this one's model and size may share a batch."""

    def render(self, requests: Sequence[RenderRequest]) -> Rendered:
        """Role `fused`: do all stages for requests of one model and size."""

    def encode(self, texts: Sequence[TextKey]) -> EncodedTexts:
        """Role `encode`: encode texts of one checkpoint; each as if it were alone."""

    def render_encoded(
        self, requests: Sequence[RenderRequest], embeds: Mapping[TextKey, Payload]
    ) -> Rendered:
        """Role `denoise_decode`: render with the embeddings of the requests' texts."""

    def denoise(
        self, requests: Sequence[RenderRequest], embeds: Mapping[TextKey, Payload]
    ) -> DenoisedBatch:
        """Role `denoise`: make latents of the embeddings of the requests' texts."""

    def decode(self, requests: Sequence[RenderRequest], latents: Sequence[Payload]) -> Rendered:
        """Role `decode`: make pixels of each request's latents."""

    def step_down(self) -> str | None:
        """Go on with the next poorer memory profile, and say so.

        None where there is none: the renderer is then again as it was at first.
        """
