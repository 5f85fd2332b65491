"""The sound of a clip as samples, as long as the clip."""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class Audio:
    """Sound: float32 samples (channels, num_samples) in -1..1, of one channel or two."""

    samples: NDArray[np.float32]
    sample_rate: int

    def __post_init__(self) -> None:
        samples = self.samples
        if samples.dtype != np.float32 or samples.ndim != 2 or samples.shape[0] not in (1, 2):
            raise ValueError(
                f"audio is {samples.dtype} of shape {samples.shape}; expected float32 (1 or 2, n)"
            )

    @property
    def layout(self) -> str:
        """FFmpeg's name for the channels."""
        return "mono" if self.samples.shape[0] == 1 else "stereo"


def fit_audio(audio: Audio, num_frames: int, frame_rate: Fraction) -> Audio:
    """Return the sound as long as the clip: cut at its end, or followed by silence."""
    num_samples = round(num_frames * audio.sample_rate / frame_rate)
    samples = audio.samples[:, :num_samples]
    missing = num_samples - samples.shape[1]
    if missing:
        samples = np.pad(samples, ((0, 0), (0, missing)))
    return Audio(samples=samples, sample_rate=audio.sample_rate)
