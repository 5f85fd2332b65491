"""What every pipeline is: a resident model with encode, denoise, decode, and render for all three.

requests -> encode: embeddings -> denoise: latents -> decode: pixels, and sound
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from raydiff.errors import OutOfMemoryError
from raydiff.memory.profiles import Profile
from raydiff.output.rendered import Rendered
from raydiff.output.video.audio import Audio
from raydiff.pipelines.prompt_cache import EncodedPrompt
from raydiff.request import BatchKey, ModelInfo, RenderRequest
from raydiff.weights.components import STAGES, Stage

ATTENTION_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""cuDNN first: on Hopper its kernel runs 1.5x as fast as the flash kernel that torch prefers."""


class PromptEmbeds(NamedTuple):
    """Encoded prompts, a row per request, on the encoders' device.

    Rows without a negative prompt have their empty prompt's embedding there, or zeros where the
    checkpoint asks for zeros.
    """

    prompt_embeds: Tensor  # (B, S, C)
    negative_prompt_embeds: Tensor  # (B, S, C)
    pooled_prompt_embeds: Tensor | None  # (B, P); SDXL only
    negative_pooled_prompt_embeds: Tensor | None  # (B, P); SDXL only
    warnings: tuple[str | None, ...]


class Denoised(NamedTuple):
    """Latents of a batch, and which of them are of no use."""

    latents: Sequence[Any]
    """By row: an image's (C, h, w) float32, or a clip's ClipLatents."""
    errors: tuple[str | None, ...]


class Decoded(NamedTuple):
    """Pixels and sound of a batch, and what is to be said of them."""

    pixels: Sequence[np.ndarray] | np.ndarray
    """By row: uint8 (H, W, 3), or (F, H, W, 3) of a clip; of no use where there is an error."""
    warnings: Sequence[str | None]
    errors: Sequence[str | None]
    audio: Sequence[Audio | None] | None = None
    """By row; None for images."""


class Costs:
    """Seconds of each stage and the most VRAM of one batch, known once it has run."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[Stage, float] = dict.fromkeys(STAGES, 0.0)
        self.peak_vram_bytes: int | None = None

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Measure one stage until the device has done it."""
        started = self._now()
        yield
        self.seconds[stage] += self._now() - started

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return perf_counter()


class Pipeline(ABC):
    """A model that stays loaded between calls. Not thread-safe: one caller at a time."""

    info: ModelInfo
    profile: Profile
    dtype: torch.dtype
    device: torch.device
    """Where the UNet or transformer computes, or what else is loaded."""

    @abstractmethod
    def encode(self, requests: Sequence[RenderRequest]) -> Any:
        """Encode the prompts and negative prompts of all requests: the family's embeddings, with
        `warnings` of each row."""

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> list[EncodedPrompt]:
        """Encode texts into host memory; each gets what it would get alone."""

    @abstractmethod
    def gather(
        self, requests: Sequence[RenderRequest], encoded: Mapping[str, EncodedPrompt]
    ) -> Any:
        """Return what `encode` does, of texts that are encoded already.

        Raises RowError for a request with a text that `encoded` does not have.
        """

    @abstractmethod
    def denoise_rows(self, requests: Sequence[RenderRequest], embeds: Any) -> Denoised:
        """Sample latents from each request's seed under its own settings, and check them."""

    @abstractmethod
    def decode_rows(self, latents: Sequence[Any]) -> Decoded:
        """Decode each row's latents, and check the pixels."""

    @abstractmethod
    def on_host(self, latents: Any) -> Any:
        """Return a copy of one row's latents in host memory, in tensors of its own."""

    @property
    def dtype_name(self) -> str:
        """`float32`, `bfloat16` or `float16`: what the UNet computes in."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def device_name(self) -> str:
        """`cpu`, or the GPU's product name."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return "cpu"

    def _attention_backends(self) -> AbstractContextManager[None]:
        """Let attention try the kernels in our order."""
        if self.device.type == "cuda":
            return sdpa_kernel(ATTENTION_BACKENDS, set_priority=True)
        return nullcontext()

    def max_batch_size(self, key: BatchKey) -> int:
        """Return how many requests of this shape the memory profile lets share a batch."""
        return self.profile.max_batch_size(key.height, key.width, key.num_frames)

    def render(
        self,
        requests: Sequence[RenderRequest],
        encoded: Mapping[str, EncodedPrompt] | None = None,
    ) -> Rendered:
        """Run the stages; with `encoded` texts, all but the first. All requests are of one size.

        Raises OutOfMemoryError when the batch does not fit; the pipeline stays usable.
        """
        with self.measured(requests) as costs:
            with costs.timed("encode"):
                embeds = (
                    self.encode(requests) if encoded is None else self.gather(requests, encoded)
                )
            with costs.timed("denoise"):
                denoised = self.denoise_rows(requests, embeds)
            with costs.timed("decode"):
                decoded = self._decode_good(requests, denoised)
        return self.rendered(decoded, [*map(joined, embeds.warnings, decoded.warnings)], costs)

    def rendered(self, decoded: Decoded, warnings: Sequence[str | None], costs: Costs) -> Rendered:
        """Return the decoded rows of a batch with what is to be said of them, and their costs."""
        pixels = list(decoded.pixels)
        return Rendered(
            pixels=pixels,
            audio=decoded.audio or [None] * len(pixels),
            warnings=tuple(warnings),
            errors=tuple(decoded.errors),
            encode_s=costs.seconds["encode"],
            denoise_s=costs.seconds["denoise"],
            decode_s=costs.seconds["decode"],
            peak_vram_bytes=costs.peak_vram_bytes,
            profile=self.profile.name,
            dtype=self.dtype_name,
        )

    @contextmanager
    def measured(self, requests: Sequence[RenderRequest]) -> Iterator[Costs]:
        """Measure what the stages of a batch cost; see `fitting`."""
        costs = Costs(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        first = requests[0]
        with self.fitting(f"a batch of {len(requests)} at {first.width}x{first.height}"):
            yield costs
        if self.device.type == "cuda":
            costs.peak_vram_bytes = torch.cuda.max_memory_reserved(self.device)

    @contextmanager
    def fitting(self, what: str) -> Iterator[None]:
        """Raise raydiff's OutOfMemoryError, which says `what` does not fit, for torch's."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise OutOfMemoryError(
                f"{what} does not fit {self.device_name} under profile {self.profile.name}: "
                f"{str(error).splitlines()[0]} "
                "Use a smaller engine.batch_size or a profile that needs less memory."
            ) from error

    def _decode_good(self, requests: Sequence[RenderRequest], denoised: Denoised) -> Decoded:
        """Decode the rows whose latents are of use; the others are black, or without frames."""
        good = [row for row, error in enumerate(denoised.errors) if error is None]
        if len(good) == len(requests):
            return self.decode_rows(denoised.latents)
        pixels = [_black(request) for request in requests]
        warnings: list[str | None] = [None] * len(requests)
        errors = list(denoised.errors)
        audio: list[Audio | None] = [None] * len(requests)
        if good:
            decoded = self.decode_rows([denoised.latents[row] for row in good])
            for place, row in enumerate(good):
                pixels[row] = decoded.pixels[place]
                warnings[row], errors[row] = decoded.warnings[place], decoded.errors[place]
                audio[row] = decoded.audio[place] if decoded.audio is not None else None
        return Decoded(pixels, warnings, errors, audio)


def _black(request: RenderRequest) -> np.ndarray:
    shape = (request.height, request.width, 3)
    return np.zeros(shape if request.video is None else (0, *shape), np.uint8)


def joined(*warnings: str | None) -> str | None:
    """Return the warnings of one row as one."""
    return "; ".join(warning for warning in warnings if warning is not None) or None
