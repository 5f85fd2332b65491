"""What a renderer hands over: the pixels and sound of a batch, on their way to files."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raydiff.output.video.audio import Audio


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """The images or clips of one batch, and what they cost. Seconds are the whole batch's."""

    pixels: Sequence[np.ndarray]
    """uint8 (H, W, 3) per request, (F, H, W, 3) of a clip; black, or without frames, where there is
    an error."""
    audio: Sequence[Audio | None]
    """A clip's sound, which may be a few milliseconds longer or shorter than its frames."""
    warnings: Sequence[str | None]
    errors: Sequence[str | None]
    """Why a request has no file: NaN in its latents or its pixels. None where it has one."""
    encode_s: float
    denoise_s: float
    decode_s: float
    peak_vram_bytes: int | None
    """Most bytes that torch's allocator held during the batch; None without a GPU."""
    profile: str
    """Name of the memory profile."""
    dtype: str
