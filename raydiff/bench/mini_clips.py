"""What mini-ltx2 has learnt: clips of held-out captions, and whether they show and sound as they
say."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import raydiff
from raydiff.bench.mini import SCENE_SEED, request_of, share
from raydiff.mini.ltx2.captions import clip_caption
from raydiff.mini.ltx2.measure import score_clip
from raydiff.mini.ltx2.scenes import (
    CANVAS,
    FRAME_RATE,
    NUM_FRAMES,
    ClipScene,
    is_held_out,
    sample_clip_scene,
)
from raydiff.output.video.audio import Audio
from raydiff.pipelines.base import Pipeline
from raydiff.request import ModelInfo, RenderRequest
from raydiff.video_settings import VideoSettings

SHEET_FRAMES = 5
"""Of each clip, side by side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MiniClipReport:
    """Shares of the clips that show, and sound, as the caption says."""

    model: str
    num_captions: int
    guidance_scale: float
    num_inference_steps: int
    color: float
    shape: float
    direction: float
    background: float
    tone: float
    pan: float
    """Of the clips whose shape moves left or right: its sound goes with it."""
    everything: float
    """All of these at once."""
    seconds_per_clip: float


class Clip(NamedTuple):
    """What a request became."""

    frames: NDArray[np.uint8]
    """(F, H, W, 3)."""
    audio: Audio | None


def held_out_clips(num_clips: int, *, seed: int = SCENE_SEED) -> list[tuple[ClipScene, str]]:
    """Return scenes that no training has seen, each with a caption."""
    rng = np.random.default_rng(seed)
    found: list[tuple[ClipScene, str]] = []
    while len(found) < num_clips:
        scene = sample_clip_scene(rng)
        if is_held_out(scene):
            found.append((scene, clip_caption(scene, rng)))
    return found


def bench_mini_clips(
    model: str,
    *,
    num_captions: int = 400,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    batch_size: int = 16,
    sheet: str | Path | None = None,
) -> MiniClipReport:
    """Render held-out captions, look and listen; `sheet` shows frames of the first clips."""
    pipeline = raydiff.load_pipeline(model)
    chosen: dict[str, Any] = {
        "guidance_scale": 3.0 if guidance_scale is None else guidance_scale,
        "num_inference_steps": num_inference_steps or 20,
    }
    scenes = held_out_clips(num_captions)
    requests = [
        clip_request_of(pipeline.info, text, seed, **chosen)
        for seed, (_, text) in enumerate(scenes)
    ]
    started = time.perf_counter()
    clips = render_clips(pipeline, requests, batch_size)
    elapsed_s = time.perf_counter() - started
    scores = [score_clip(scene, *clip) for (scene, _), clip in zip(scenes, clips, strict=True)]
    if sheet is not None:
        _save_sheet(clips, Path(sheet))
    shares: dict[str, Any] = {
        name: share(scores, name)
        for name in ("color", "shape", "direction", "background", "tone", "pan")
    }
    return MiniClipReport(
        model=model,
        num_captions=num_captions,
        **chosen,
        **shares,
        everything=share(scores, "is_right"),
        seconds_per_clip=elapsed_s / num_captions,
    )


def clip_request_of(info: ModelInfo, prompt: str, seed: int, **values: Any) -> RenderRequest:
    """Return a clip as mini-ltx2 makes it by default, but for `values`; the sound's guidance is the
    picture's."""
    settings: dict[str, Any] = {
        "task": "txt2vid",
        "height": CANVAS,
        "width": CANVAS,
        "num_inference_steps": 20,
        "guidance_scale": 3.0,
    } | values
    video = VideoSettings(
        video_mode="one_stage",
        text_encoder="gemma3",
        num_frames=NUM_FRAMES,
        frame_rate=FRAME_RATE,
        stg_scale=0.0,
        stg_blocks=(0,),
        modality_scale=1.0,
        audio_guidance_scale=settings["guidance_scale"],
        audio_stg_scale=0.0,
        audio_modality_scale=1.0,
        audio_guidance_rescale=0.0,
    )
    return request_of(info, prompt, seed, video=video, **settings)


def render_clips(
    pipeline: Pipeline, requests: Sequence[RenderRequest], batch_size: int
) -> list[Clip]:
    """Return the frames and the sound of each request."""
    clips: list[Clip] = []
    for start in range(0, len(requests), batch_size):
        batch = pipeline.render(requests[start : start + batch_size])
        clips += map(Clip, batch.pixels, batch.audio)
    return clips


def _save_sheet(clips: Sequence[Clip], path: Path) -> None:
    """Show some frames of each clip, in rows of two clips."""
    strips = [
        np.concatenate([*clip.frames[:: (NUM_FRAMES - 1) // (SHEET_FRAMES - 1)]], axis=1)
        for clip in clips
    ]
    rows = [np.concatenate(strips[at : at + 2], axis=1) for at in range(0, len(strips) - 1, 2)]
    Image.fromarray(np.concatenate(rows)).save(path)
