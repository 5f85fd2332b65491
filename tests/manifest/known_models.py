"""What validation knows of some checkpoints."""

from dataclasses import replace
from typing import Any

from raydiff.request import ModelInfo, VideoModel

SDXL = ModelInfo(
    name="sdxl",
    family="sdxl",
    path="/models/sdxl",
    revision="local-sdxl",
    tasks=("txt2img", "img2img"),
    default_height=1024,
    default_width=1024,
    size_multiple=8,
    default_num_inference_steps=30,
    default_guidance_scale=5.0,
    default_strength=0.3,
    default_sampler="euler",
    num_parameters={"unet": 2_567_463_684},
)
LTX2 = ModelInfo(
    name="ltx2",
    family="ltx2",
    path="/models/ltx2",
    revision="local-ltx2",
    tasks=("txt2vid", "img2vid"),
    default_height=512,
    default_width=768,
    size_multiple=32,
    default_num_inference_steps=40,
    default_guidance_scale=3.0,
    default_strength=1.0,
    default_sampler="euler",
    num_parameters={"transformer": 18_876_174_592},
    samplers=("euler",),
    video=VideoModel(
        num_layers=48,
        default_stg_block=29,
        spatial_downscale=32,
        temporal_downscale=8,
        has_upsampler=True,
    ),
)


def without_upsampler(info: ModelInfo, **changes: Any) -> ModelInfo:
    """Return a checkpoint that makes clips in one stage only."""
    assert info.video is not None
    return replace(info, video=replace(info.video, has_upsampler=False), **changes)
