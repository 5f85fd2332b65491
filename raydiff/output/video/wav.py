"""WAV files, 16-bit PCM."""

import io
import wave
from typing import BinaryIO

import numpy as np

from raydiff.output.media_files import MediaError
from raydiff.output.video.audio import Audio

FULL_SCALE = 32768
"""What a sample of 1.0 is in 16 bits; readers divide by it."""


def encode_wav(audio: Audio) -> bytes:
    """Return the sound as the bytes of a WAV file, 16-bit PCM; louder than 1.0 is clipped."""
    scaled = np.rint(audio.samples.T * FULL_SCALE)  # (num_samples, channels)
    values = scaled.clip(-FULL_SCALE, FULL_SCALE - 1).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(audio.samples.shape[0])
        file.setsampwidth(2)
        file.setframerate(audio.sample_rate)
        file.writeframes(values.tobytes())
    return buffer.getvalue()


def read_wav(file: BinaryIO) -> Audio:
    """Return the sound in a 16-bit WAV file. Raises MediaError."""
    try:
        with wave.open(file, "rb") as opened:
            num_channels, width, rate, num_samples, *_ = opened.getparams()
            data = opened.readframes(num_samples)
    except (OSError, EOFError, wave.Error) as error:
        raise MediaError(f"cannot be read: {error or 'it ends too early'}") from None
    if width != 2 or len(data) != num_samples * num_channels * width:
        raise MediaError("not a whole 16-bit WAV file")
    values = np.frombuffer(data, "<i2").reshape(-1, num_channels)
    samples = np.ascontiguousarray(values.T, dtype=np.float32) / np.float32(FULL_SCALE)
    return Audio(samples=samples, sample_rate=rate)
