"""What is asked of LTX-2: one clip with its sound, the ways to make it, and the official
pipeline's values for what a row leaves open.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from raydiff.diffusion.flow_match import DISTILLED_SIGMAS
from raydiff.diffusion.x0_guidance import RowGuidance, StreamGuidance
from raydiff.errors import RowError
from raydiff.models.ltx2.transformer_config import LTX2TransformerConfig

Mode = Literal["one_stage", "two_stage", "distilled", "distilled_two_stage"]
"""`distilled` are the checkpoints with a schedule of their own and no need of guidance. Two stages:
half the size first, then a few steps at the whole size from what an upsampler makes of that."""
MODES: tuple[Mode, ...] = ("one_stage", "two_stage", "distilled", "distilled_two_stage")

MIN_FRAME_RATE, MAX_FRAME_RATE = 1.0, 60.0
"""Positions are in seconds: the checkpoints were trained up to 60 frames per second."""

NUM_DISTILLED_STEPS = len(DISTILLED_SIGMAS) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LTX2Request:
    """One clip to make: every value that affects it, complete. Names are the manifest's columns."""

    prompt: str
    negative_prompt: str | None
    seed: int
    height: int
    width: int
    num_frames: int
    frame_rate: float
    num_inference_steps: int
    guidance_scale: float
    stg_scale: float
    stg_blocks: tuple[int, ...]
    modality_scale: float
    guidance_rescale: float
    audio_guidance_scale: float
    audio_stg_scale: float
    audio_modality_scale: float
    audio_guidance_rescale: float
    init_image: str | None = None
    """img2vid: path of the first frame; None for txt2vid."""

    @property
    def guidance(self) -> RowGuidance:
        """The scales of both streams."""
        return RowGuidance(
            video=StreamGuidance(
                guidance_scale=self.guidance_scale,
                stg_scale=self.stg_scale,
                modality_scale=self.modality_scale,
                guidance_rescale=self.guidance_rescale,
            ),
            audio=StreamGuidance(
                guidance_scale=self.audio_guidance_scale,
                stg_scale=self.audio_stg_scale,
                modality_scale=self.audio_modality_scale,
                guidance_rescale=self.audio_guidance_rescale,
            ),
            stg_blocks=self.stg_blocks,
        )


def is_distilled(mode: Mode) -> bool:
    """Whether the first stage takes the distilled checkpoints' own steps."""
    return mode in ("distilled", "distilled_two_stage")


def has_second_stage(mode: Mode) -> bool:
    """Whether the clip is made at half its size first."""
    return mode in ("two_stage", "distilled_two_stage")


def default_values(config: LTX2TransformerConfig, mode: Mode) -> dict[str, Any]:
    """Return the official pipeline's values of the fields that say how a clip is denoised.

    2.0 leaves out self attention in block 29 of its 48, 2.3 and later in block 28, and both the
    nearest block there is in a smaller network.
    """
    is_20 = not config.has_gated_attention
    stg_block = min(29 if is_20 else 28, config.num_layers - 1)
    if is_distilled(mode):
        steps, guided = NUM_DISTILLED_STEPS, StreamGuidance()
        audio_guidance_scale = 1.0
    else:
        steps = 40 if is_20 else 30
        guided = StreamGuidance(
            guidance_scale=3.0, stg_scale=1.0, modality_scale=3.0, guidance_rescale=0.7
        )
        audio_guidance_scale = 7.0
    return {
        "num_inference_steps": steps,
        "guidance_scale": guided.guidance_scale,
        "stg_scale": guided.stg_scale,
        "stg_blocks": (stg_block,),
        "modality_scale": guided.modality_scale,
        "guidance_rescale": guided.guidance_rescale,
        "audio_guidance_scale": audio_guidance_scale,
        "audio_stg_scale": guided.stg_scale,
        "audio_modality_scale": guided.modality_scale,
        "audio_guidance_rescale": guided.guidance_rescale,
    }


def check_request(
    request: LTX2Request,
    mode: Mode,
    *,
    spatial_downscale: int,
    temporal_downscale: int,
    num_layers: int,
) -> None:
    """Raise RowError, which names the nearest valid values, for a clip that cannot be made."""
    multiple = spatial_downscale * (2 if has_second_stage(mode) else 1)
    for name, size in (("height", request.height), ("width", request.width)):
        if size < multiple or size % multiple:
            below = size // multiple * multiple
            nearest = f"{below} or {below + multiple}" if below > 0 else str(multiple)
            stages = "in two stages " if has_second_stage(mode) else ""
            raise RowError(
                f"{name} is {size}; LTX-2 {stages}needs a multiple of {multiple}. Use {nearest}."
            )
    _check_num_frames(request.num_frames, temporal_downscale)
    rate = request.frame_rate
    if not MIN_FRAME_RATE <= rate <= MAX_FRAME_RATE:
        nearest_rate = MAX_FRAME_RATE if rate > MAX_FRAME_RATE else MIN_FRAME_RATE
        raise RowError(
            f"frame_rate is {rate:g}; LTX-2 takes {MIN_FRAME_RATE:g} to {MAX_FRAME_RATE:g} frames "
            f"per second. Use {nearest_rate:g}."
        )
    if is_distilled(mode) and request.num_inference_steps != NUM_DISTILLED_STEPS:
        raise RowError(
            f"num_inference_steps is {request.num_inference_steps}; a distilled LTX-2 has "
            f"{NUM_DISTILLED_STEPS} steps. Use {NUM_DISTILLED_STEPS} or leave it out."
        )
    _check_guidance(request, num_layers)


def _check_num_frames(num_frames: int, scale: int) -> None:
    if num_frames < 1 or num_frames % scale != 1:
        below = (num_frames - 1) // scale * scale + 1
        nearest = f"{below} or {below + scale}" if below > 0 else "1"
        raise RowError(
            f"num_frames is {num_frames}; LTX-2 needs a multiple of {scale} and one. Use {nearest}."
        )


def _check_guidance(request: LTX2Request, num_layers: int) -> None:
    for stream, guidance in (("", request.guidance.video), ("audio_", request.guidance.audio)):
        for name in ("guidance_scale", "stg_scale", "modality_scale", "guidance_rescale"):
            value = getattr(guidance, name)
            most = 1.0 if name == "guidance_rescale" else math.inf
            if not 0 <= value <= most or value == math.inf:
                rule = "0 to 1" if name == "guidance_rescale" else "a number from 0"
                raise RowError(f"{stream}{name} is {value:g}; expected {rule}.")
    if "perturbed" in request.guidance.passes and not request.stg_blocks:
        raise RowError(
            "stg_blocks is empty and stg_scale is above 0; name the blocks whose self attention "
            "is left out, or set stg_scale and audio_stg_scale to 0."
        )
    for block in request.stg_blocks:
        if not 0 <= block < num_layers:
            raise RowError(f"stg_blocks has {block}; this LTX-2 has blocks 0 to {num_layers - 1}.")
