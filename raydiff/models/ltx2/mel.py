"""Sound to the log-mel spectrogram that LTX-2's audio autoencoder encodes: magnitudes of a centred
STFT, Slaney's mel filters of equal area, natural logarithm.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from raydiff.errors import RowError

WINDOW = 1024
"""Samples of one Fourier transform, whatever the hop length; in no config file."""

FLOOR = 1e-5
"""Silence: magnitudes below count as this much."""

LINEAR_HERTZ = 1000.0
"""Slaney's scale: below, 15 mels in equal steps."""

LINEAR_MELS = 15.0

LOG_STEP = math.log(6.4) / 27
"""Above, this much of the logarithm of the frequency is one mel."""


def log_mel(waveform: Tensor, *, sample_rate: int, hop_length: int, num_mels: int) -> Tensor:
    """Return the spectrogram (B, C, N // hop_length + 1, num_mels), float32, of sound (B, C, N).

    `waveform` is in -1..1 and at `sample_rate`. RowError if it is no longer than half a window.
    """
    num_samples = waveform.shape[-1]
    if num_samples <= WINDOW // 2:
        raise RowError(
            f"the sound has {num_samples} samples; a spectrogram needs more than {WINDOW // 2}, "
            f"{WINDOW // 2 / sample_rate:.3f} s. Use a longer sound."
        )
    spectrum = torch.stft(
        waveform.float().flatten(0, 1),
        WINDOW,
        hop_length=hop_length,
        window=torch.hann_window(WINDOW, device=waveform.device),
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )
    magnitudes = spectrum.abs().transpose(1, 2)  # (B * C, frames, frequencies)
    mels = magnitudes @ mel_filters(num_mels, sample_rate).to(magnitudes.device)
    return mels.clamp(min=FLOOR).log().unflatten(0, waveform.shape[:2])


@lru_cache(maxsize=4)
def mel_filters(num_mels: int, sample_rate: int) -> Tensor:
    """Return triangles (frequencies, num_mels), float32 on the CPU, from 0 to half the rate.

    They are evenly spaced on Slaney's scale and have an area of 1 in hertz each.
    """
    highest = sample_rate / 2
    frequencies = torch.linspace(0, highest, WINDOW // 2 + 1, dtype=torch.float64, device="cpu")
    mels = torch.linspace(0, _mel(highest), num_mels + 2, dtype=torch.float64, device="cpu")
    corners = torch.where(
        mels < LINEAR_MELS,
        mels * (LINEAR_HERTZ / LINEAR_MELS),
        LINEAR_HERTZ * torch.exp((mels - LINEAR_MELS) * LOG_STEP),
    )
    lower, centre, upper = corners[:-2], corners[1:-1], corners[2:]
    rise = (frequencies[:, None] - lower) / (centre - lower)
    fall = (upper - frequencies[:, None]) / (upper - centre)
    return (torch.minimum(rise, fall).clamp(min=0) * 2 / (upper - lower)).float()


def _mel(hertz: float) -> float:
    if hertz < LINEAR_HERTZ:
        return hertz * LINEAR_MELS / LINEAR_HERTZ
    return LINEAR_MELS + math.log(hertz / LINEAR_HERTZ) / LOG_STEP
