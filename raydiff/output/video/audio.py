"""The sound of a clip as samples, as long as the clip."""

import math
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


def sound_snr(left: Audio | None, right: Audio | None) -> float:
    """Return how much louder than their difference the left of two sounds is, in dB.

    Infinite where they are equal, minus infinite where one has another length, rate or number of
    channels, or is not there.
    """
    if left is None or right is None:
        return math.inf if left is right else -math.inf
    if left.sample_rate != right.sample_rate or left.samples.shape != right.samples.shape:
        return -math.inf
    samples = left.samples.astype(np.float64)
    power, noise = float((samples**2).sum()), float(((samples - right.samples) ** 2).sum())
    if not noise:
        return math.inf
    return 10 * math.log10(power / noise) if power else -math.inf
