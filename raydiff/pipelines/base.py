"""What every pipeline is: a resident model with encode, denoise, decode, and render for all three.

requests -> encode: PromptEmbeds -> denoise: latents -> decode: pixels
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raydiff.errors import OutOfMemoryError
from raydiff.memory.profiles import Profile
from raydiff.pipelines.prompt_cache import EncodedPrompt
from raydiff.request import ModelInfo, RenderRequest

Stage = Literal["encode", "denoise", "decode"]
STAGES: tuple[Stage, ...] = ("encode", "denoise", "decode")


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

    latents: Tensor  # (B, C, h, w) float32
    errors: tuple[str | None, ...]


class Decoded(NamedTuple):
    """Pixels of a batch, and what is to be said of them."""

    pixels: np.ndarray
    """uint8 (B, H, W, 3); of no use where there is an error."""
    warnings: tuple[str | None, ...]
    errors: tuple[str | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """The images of one batch, and what they cost. Seconds are the whole batch's."""

    pixels: list[np.ndarray]
    """uint8 (H, W, 3) per request; black where there is an error."""
    warnings: tuple[str | None, ...]
    errors: tuple[str | None, ...]
    """Why a request has no image: NaN in its latents or its pixels. None where it has one."""
    encode_s: float
    denoise_s: float
    decode_s: float
    peak_vram_bytes: int | None
    """Most bytes that torch's allocator held during the batch; None without a GPU."""


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
    def encode(self, requests: Sequence[RenderRequest]) -> PromptEmbeds:
        """Encode the prompts and negative prompts of all requests."""

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> list[EncodedPrompt]:
        """Encode texts into host memory; each gets what it would get alone."""

    @abstractmethod
    def gather(
        self, requests: Sequence[RenderRequest], encoded: Mapping[str, EncodedPrompt]
    ) -> PromptEmbeds:
        """Return what `encode` does, of texts that are encoded already.

        Raises RowError for a request with a text that `encoded` does not have.
        """

    @abstractmethod
    def denoise_rows(self, requests: Sequence[RenderRequest], embeds: PromptEmbeds) -> Denoised:
        """Sample latents (B, C, h, w) float32 from each request's seed, and check them."""

    @abstractmethod
    def decode_rows(self, latents: Tensor) -> Decoded:
        """Decode latents (B, C, h, w), and check the pixels.

        Where they are not finite, or black of latents that are not, the VAE tries again in
        float32.
        """

    def denoise(self, requests: Sequence[RenderRequest], embeds: PromptEmbeds) -> Tensor:
        """Sample latents (B, C, h, w) float32 from each request's seed under its own settings."""
        return self.denoise_rows(requests, embeds).latents

    def decode(self, latents: Tensor) -> np.ndarray:
        """Decode latents (B, C, h, w) to pixels (B, H, W, 3) uint8."""
        return self.decode_rows(latents).pixels

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

    def max_batch_size(self, height: int, width: int) -> int:
        """Return how many images of this size the memory profile lets share a batch."""
        return self.profile.max_batch_size(height, width)

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
        return Rendered(
            pixels=list(decoded.pixels),
            warnings=tuple(map(joined, embeds.warnings, decoded.warnings)),
            errors=decoded.errors,
            encode_s=costs.seconds["encode"],
            denoise_s=costs.seconds["denoise"],
            decode_s=costs.seconds["decode"],
            peak_vram_bytes=costs.peak_vram_bytes,
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
        """Decode the rows whose latents are of use; the others' images are black."""
        good = [row for row, error in enumerate(denoised.errors) if error is None]
        if len(good) == len(requests):
            return self.decode_rows(denoised.latents)
        first = requests[0]
        pixels = np.zeros((len(requests), first.height, first.width, 3), np.uint8)
        warnings: list[str | None] = [None] * len(requests)
        errors = list(denoised.errors)
        if good:
            decoded = self.decode_rows(denoised.latents[good])
            pixels[good] = decoded.pixels
            for row, warning, error in zip(good, decoded.warnings, decoded.errors, strict=True):
                warnings[row], errors[row] = warning, error
        return Decoded(pixels, tuple(warnings), tuple(errors))


def joined(*warnings: str | None) -> str | None:
    """Return the warnings of one row as one."""
    return "; ".join(warning for warning in warnings if warning is not None) or None
