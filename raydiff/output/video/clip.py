"""A clip on its way to a file: what is known of it before its frames are, and the frames as they
come."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raydiff.output.video.audio import Audio

Frame = NDArray[np.uint8]
"""(H, W, 3), contiguous."""
NTSC_RATES = (24, 30, 48, 60, 120)
MAX_DENOMINATOR = 1001


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One video to write; its frames come apart from it, in chunks."""

    request_id: str
    height: int
    width: int
    num_frames: int
    frame_rate: Fraction
    """Frames per second; see `exact_rate`."""
    audio: Audio | None = None
    metadata: dict[str, Any] | None = None
    """The request, to be carried in the file."""

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return float(self.num_frames / self.frame_rate)


def exact_rate(frame_rate: float) -> Fraction:
    """Return a frame rate as a fraction: 23.976, 23.98 and 24000 / 1001 are all 24000/1001."""
    for whole in NTSC_RATES:
        if abs(frame_rate - whole / 1.001) < 0.005:
            return Fraction(whole * 1000, 1001)
    return Fraction(frame_rate).limit_denominator(MAX_DENOMINATOR)


def iterate_frames(chunks: Iterable[NDArray[np.uint8]], clip: Clip) -> Iterator[Frame]:
    """Yield the frames of `chunks`, each uint8 (F, H, W, 3), one by one.

    Raises ValueError if they are not the clip's in size or number.
    """
    size = (clip.height, clip.width, 3)
    num_seen = 0
    for chunk in chunks:
        if chunk.dtype != np.uint8 or chunk.ndim != 4 or chunk.shape[1:] != size:
            raise ValueError(
                f"frames are {chunk.dtype} of shape {chunk.shape}; expected uint8 (F, *{size})"
            )
        num_seen += len(chunk)
        if num_seen > clip.num_frames:
            raise ValueError(f"{num_seen} frames came; the clip has {clip.num_frames}")
        yield from map(np.ascontiguousarray, chunk)
    if num_seen < clip.num_frames:
        raise ValueError(f"{num_seen} frames came; the clip has {clip.num_frames}")
