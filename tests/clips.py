"""Small clips for the tests of whatever carries, writes or reads one."""

from typing import Any

from raydiff.video_settings import VideoSettings

NUM_FRAMES = 9
FRAME_RATE = 8.0


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
