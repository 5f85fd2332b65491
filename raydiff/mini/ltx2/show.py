"""Training clips as one video with sound, to see and hear what mini-ltx2 does."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from raydiff.config import OutputConfig
from raydiff.mini.ltx2.captions import clip_caption
from raydiff.mini.ltx2.draw import SAMPLE_RATE, draw_clips, draw_sounds, table
from raydiff.mini.ltx2.scenes import FRAME_RATE, NUM_FRAMES, sample_clip_scene, sample_way
from raydiff.mini.show import to_uint8
from raydiff.output.video.audio import Audio
from raydiff.output.video.clip import Clip, exact_rate
from raydiff.output.video.writer import encode_clip

CLIP_SAMPLES = round(NUM_FRAMES / FRAME_RATE * SAMPLE_RATE)


def show_clips(path: str | Path, num_clips: int, seed: int) -> Iterator[str]:
    """Write `num_clips` clips one after another into an MP4 file, and yield a caption of each."""
    rng = np.random.default_rng(seed)
    scenes = [sample_clip_scene(rng) for _ in range(num_clips)]
    tables = torch.from_numpy(
        np.stack([table(scene, sample_way(scene, rng), rng) for scene in scenes])
    )
    frames = to_uint8(draw_clips(tables).transpose(1, 2).flatten(0, 1))  # (B * F, H, W, 3)
    sounds = draw_sounds(tables).numpy()
    sounds = np.pad(sounds, ((0, 0), (0, 0), (0, CLIP_SAMPLES - sounds.shape[2])))
    audio = Audio(samples=np.concatenate([*sounds], axis=1), sample_rate=SAMPLE_RATE)
    clip = Clip(
        request_id="training clips",
        num_frames=len(frames),
        height=frames.shape[1],
        width=frames.shape[2],
        frame_rate=exact_rate(FRAME_RATE),
        audio=audio,
    )
    Path(path).write_bytes(encode_clip(clip, [frames], OutputConfig()))
    yield from (clip_caption(scene, rng) for scene in scenes)
