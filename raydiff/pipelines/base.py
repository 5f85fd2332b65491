"""What every pipeline is: a resident model with encode, denoise, decode, and render for all three.

requests -> encode: PromptEmbeds -> denoise: latents -> decode: pixels
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raydiff.errors import OutOfMemoryError
from raydiff.memory.profiles import Profile
from raydiff.request import ModelInfo, RenderRequest


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """The images of one batch, and what they cost. Seconds are the whole batch's."""

    pixels: list[np.ndarray]
    """uint8 (H, W, 3) per request."""
    warnings: tuple[str | None, ...]
    encode_s: float
    denoise_s: float
    decode_s: float
    peak_vram_bytes: int | None
    """Most bytes that torch's allocator held during the batch; None without a GPU."""


class Pipeline(ABC):
    """A model that stays loaded between calls. Not thread-safe: one caller at a time."""

    info: ModelInfo
    profile: Profile
    dtype: torch.dtype
    device: torch.device
    """Where the UNet or transformer computes."""

    @abstractmethod
    def encode(self, requests: Sequence[RenderRequest]) -> PromptEmbeds:
        """Encode the prompts and negative prompts of all requests."""

    @abstractmethod
    def denoise(self, requests: Sequence[RenderRequest], embeds: PromptEmbeds) -> Tensor:
        """Sample latents (B, C, h, w) float32 from each request's seed under its own settings."""

    @abstractmethod
    def decode(self, latents: Tensor) -> np.ndarray:
        """Decode latents (B, C, h, w) to pixels (B, H, W, 3) uint8."""

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

    def render(self, requests: Sequence[RenderRequest]) -> Rendered:
        """Run the three stages. All requests are of one size.

        Raises OutOfMemoryError when the batch does not fit; the pipeline stays usable.
        """
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            started = self._now()
            embeds = self.encode(requests)
            encoded = self._now()
            latents = self.denoise(requests, embeds)
            denoised = self._now()
            pixels = self.decode(latents)
            decoded = self._now()
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(self._out_of_memory(requests, error)) from error
        peak = None
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_reserved(self.device)
        return Rendered(
            pixels=list(pixels),
            warnings=embeds.warnings,
            encode_s=encoded - started,
            denoise_s=denoised - encoded,
            decode_s=decoded - denoised,
            peak_vram_bytes=peak,
        )

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return perf_counter()

    def _out_of_memory(self, requests: Sequence[RenderRequest], error: Exception) -> str:
        torch.cuda.empty_cache()
        first = requests[0]
        reason = str(error).splitlines()[0]
        return (
            f"a batch of {len(requests)} at {first.width}x{first.height} does not fit "
            f"{self.device_name} under profile {self.profile.name}: {reason} "
            "Use a smaller engine.batch_size or a profile that needs less memory."
        )
