"""What validation and planning see of the model that NullRenderer stands for."""

from raydiff.request import ModelInfo

IMAGE_SIZE = 8

MODEL = ModelInfo(
    name="null",
    family="sd21",
    path="",
    revision="local-null",
    tasks=("txt2img",),
    default_height=IMAGE_SIZE,
    default_width=IMAGE_SIZE,
    size_multiple=IMAGE_SIZE,
    default_num_inference_steps=1,
    default_guidance_scale=1.0,
    default_strength=1.0,
    default_sampler="ddim",
    num_parameters={},
)
