"""The rules of clips: what a row leaves open, and which values a checkpoint cannot make."""

from collections.abc import Container, Iterator, Mapping
from typing import Any

from raydiff.errors import ConfigError
from raydiff.request import ModelInfo, VideoModel
from raydiff.video_settings import (
    NUM_DISTILLED_STEPS,
    StreamGuidance,
    VideoMode,
    has_second_stage,
    is_distilled,
)

NUM_FRAMES, FRAME_RATE = 121, 24.0
"""The reference pipeline's defaults: five seconds and a frame."""

MIN_FRAME_RATE, MAX_FRAME_RATE = 1.0, 60.0
"""Positions are in seconds: the checkpoints were trained up to 60 frames per second."""


def video_defaults(info: ModelInfo, mode: VideoMode) -> dict[str, Any]:
    """Return the official pipeline's values, by column, of what says how a clip is made."""
    video = _video(info)
    if is_distilled(mode):
        steps, guided = NUM_DISTILLED_STEPS, StreamGuidance()
        audio_guidance_scale = 1.0
    else:
        steps = info.default_num_inference_steps
        guided = StreamGuidance(
            guidance_scale=info.default_guidance_scale,
            stg_scale=1.0,
            modality_scale=3.0,
            guidance_rescale=0.7,
        )
        audio_guidance_scale = 7.0
    return {
        "video_mode": mode,
        "num_frames": NUM_FRAMES,
        "frame_rate": FRAME_RATE,
        "num_inference_steps": steps,
        "guidance_scale": guided.guidance_scale,
        "stg_scale": guided.stg_scale,
        "stg_blocks": (video.default_stg_block,),
        "modality_scale": guided.modality_scale,
        "guidance_rescale": guided.guidance_rescale,
        "audio_guidance_scale": audio_guidance_scale,
        "audio_stg_scale": guided.stg_scale,
        "audio_modality_scale": guided.modality_scale,
        "audio_guidance_rescale": guided.guidance_rescale,
    }


def video_size_multiple(info: ModelInfo, mode: VideoMode) -> int:
    """Return what a clip's height and width are multiples of."""
    return info.size_multiple * (2 if has_second_stage(mode) else 1)


def check_video_mode(info: ModelInfo, mode: VideoMode) -> None:
    """Raise ConfigError if the checkpoint cannot make clips in the run's mode."""
    if has_second_stage(mode) and not _video(info).has_upsampler:
        raise ConfigError(
            f"ltx2.mode is {mode}; that needs a latent upsampler, which {info.name} is without. "
            "Use another mode, or add the folder latent_upsampler to the checkpoint."
        )


def video_problems(
    merged: Mapping[str, Any], info: ModelInfo, values: Container[str]
) -> Iterator[str]:
    """Yield what is wrong with a clip's settings but for its size, with the nearest valid ones.

    Each by itself keeps its column's rule already. What `values`, those of the row, are without
    is the run's default.
    """
    video = _video(info)
    mode: VideoMode = merged["video_mode"]
    num_frames = subject("num_frames", values)
    yield from _num_frames_problems(num_frames, merged["num_frames"], video.temporal_downscale)
    rate = merged["frame_rate"]
    if not MIN_FRAME_RATE <= rate <= MAX_FRAME_RATE:
        nearest = MAX_FRAME_RATE if rate > MAX_FRAME_RATE else MIN_FRAME_RATE
        yield (
            f"{subject('frame_rate', values)} is {rate:g}; LTX-2 takes {MIN_FRAME_RATE:g} to "
            f"{MAX_FRAME_RATE:g} frames per second. Use {nearest:g}."
        )
    steps = merged["num_inference_steps"]
    if is_distilled(mode) and steps != NUM_DISTILLED_STEPS:
        yield (
            f"{subject('num_inference_steps', values)} is {steps}; a distilled LTX-2 has "
            f"{NUM_DISTILLED_STEPS} steps. Use {NUM_DISTILLED_STEPS} or leave it out."
        )
    yield from _stg_problems(subject("stg_blocks", values), merged, video.num_layers)


def subject(name: str, values: Container[str]) -> str:
    """Return how a message names a setting that is one of the row's values, or else the run's."""
    return name if name in values else f"defaults.{name}"


def _num_frames_problems(name: str, num_frames: int, scale: int) -> Iterator[str]:
    if (num_frames - 1) % scale:
        below = (num_frames - 1) // scale * scale + 1
        nearest = f"{below} or {below + scale}" if below > 0 else "1"
        yield f"{name} is {num_frames}; LTX-2 needs a multiple of {scale} and one. Use {nearest}."


def _stg_problems(name: str, merged: Mapping[str, Any], num_layers: int) -> Iterator[str]:
    blocks = merged["stg_blocks"]
    if not blocks and (merged["stg_scale"] > 0 or merged["audio_stg_scale"] > 0):
        yield (
            f"{name} is empty and stg_scale is above 0; name the blocks whose self attention is "
            "left out, or set stg_scale and audio_stg_scale to 0."
        )
    unknown = [block for block in blocks if block >= num_layers]
    if unknown:
        yield (
            f"{name} has {', '.join(map(str, unknown))}; this LTX-2 has blocks 0 to "
            f"{num_layers - 1}."
        )


def _video(info: ModelInfo) -> VideoModel:
    if info.video is None:
        raise ValueError(f"{info.name} makes images")
    return info.video
