"""What validation knows of an LTX-2 checkpoint."""

from dataclasses import replace
from typing import Any

from raydiff.request import ModelInfo, VideoModel

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
