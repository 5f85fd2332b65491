"""Small clips for the tests of whatever carries, writes or reads one."""

from typing import Any

import numpy as np

from raydiff.output.video.audio import Audio
from raydiff.video_settings import VideoSettings

NUM_FRAMES = 9
FRAME_RATE = 8.0
SAMPLE_RATE = 24_000


def video_settings(**changes: Any) -> VideoSettings:
    """Return the settings of a clip of little more than a second."""
    values: dict[str, Any] = {
        "video_mode": "one_stage",
        "text_encoder": "random",
        "num_frames": NUM_FRAMES,
        "frame_rate": FRAME_RATE,
        "stg_scale": 1.0,
        "stg_blocks": (29,),
        "modality_scale": 3.0,
        "audio_guidance_scale": 7.0,
        "audio_stg_scale": 1.0,
        "audio_modality_scale": 3.0,
        "audio_guidance_rescale": 0.7,
    }
    return VideoSettings(**{**values, **changes})


def clip_pixels(seed: int, size: int = 64) -> np.ndarray:
    """Return soft waves that move, uint8 (F, size, size, 3), others for each seed."""
    rng = np.random.default_rng(seed)
    frame, y, x = (
        np.mgrid[0:NUM_FRAMES, 0:size, 0:size]
        / np.array([NUM_FRAMES, size, size])[:, None, None, None]
    )
    wave = np.sin(rng.uniform(2, 7) * x + rng.uniform(2, 7) * y + 6 * frame) / 2 + 0.5
    low, high = rng.uniform(0, 255, (2, 3))
    return (low + wave[..., None] * (high - low)).astype(np.uint8)


def clip_audio(pitch_hz: float = 440.0) -> Audio:
    """Return a tone as long as a clip."""
    times_s = np.arange(round(NUM_FRAMES / FRAME_RATE * SAMPLE_RATE)) / SAMPLE_RATE
    tone = np.sin(2 * np.pi * pitch_hz * times_s).astype(np.float32) / 2
    return Audio(samples=np.stack([tone, tone]), sample_rate=SAMPLE_RATE)
