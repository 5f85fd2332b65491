"""Small random-weight pipelines saved by diffusers itself: the reference to be equal to."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from raydiff.tokenizer import write_tiny_tokenizer

SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "pndm": PNDMScheduler,
    "unipc": UniPCMultistepScheduler,
}

SCHEDULER_OPTIONS: dict[str, dict[str, Any]] = {
    "dpmpp_2m": {"algorithm_type": "dpmsolver++", "solver_order": 2},
    "pndm": {"skip_prk_steps": True},
}

_BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def save_reference(kind: str, folder: Path, seed: int = 0) -> None:
    """Save a random pipeline: kind is sd21-epsilon, sd21-v or sdxl."""
    torch.manual_seed(seed)
    if kind == "sdxl":
        _sdxl(folder).save_pretrained(folder)
    else:
        _sd21(folder, is_v=kind == "sd21-v").save_pretrained(folder)


def load_reference(folder: Path) -> tuple[Any, Any]:
    """Return diffusers' own (txt2img, img2img) pipelines of the folder, at fp32 on the CPU."""
    if (folder / "text_encoder_2").is_dir():
        text = StableDiffusionXLPipeline.from_pretrained(folder)
        image = StableDiffusionXLImg2ImgPipeline(**text.components)
    else:
        text = StableDiffusionPipeline.from_pretrained(folder)
        image = StableDiffusionImg2ImgPipeline(**text.components, requires_safety_checker=False)
    for pipe in (text, image):
        pipe.set_progress_bar_config(disable=True)
    return text, image


def render_reference(
    pipes: tuple[Any, Any], row: dict[str, Any], init_image: Image.Image | None
) -> Image.Image:
    """Render one manifest row with diffusers, as its documentation says to."""
    pipe = pipes[0] if init_image is None else pipes[1]
    sampler = row["sampler"]
    config = pipe.components["scheduler"].config
    pipe.scheduler = SCHEDULERS[sampler].from_config(config, **SCHEDULER_OPTIONS.get(sampler, {}))
    size = {"height": row["height"], "width": row["width"]}
    task = size if init_image is None else {"image": init_image, "strength": row["strength"]}
    output = pipe(
        prompt=row["prompt"],
        negative_prompt=row["negative_prompt"],
        num_inference_steps=row["num_inference_steps"],
        guidance_scale=row["guidance_scale"],
        generator=torch.Generator("cpu").manual_seed(row["seed"]),
        **task,
    )
    image: Image.Image = output.images[0]
    return image


def _sd21(folder: Path, *, is_v: bool) -> StableDiffusionPipeline:
    tokenizer = _tokenizer(folder / "tokenizer", "!")
    scheduler = (
        DDIMScheduler(
            **_BETAS, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction"
        )
        if is_v
        else PNDMScheduler(**_BETAS, skip_prk_steps=True, set_alpha_to_one=False)
    )
    return StableDiffusionPipeline(
        vae=_vae(0.18215),
        text_encoder=_randomised(CLIPTextModel(_clip(len(tokenizer), "gelu", 64, 3))),
        tokenizer=tokenizer,
        unet=_randomised(
            UNet2DConditionModel(
                sample_size=16,
                block_out_channels=(32, 64, 64, 64),
                layers_per_block=1,
                attention_head_dim=[2, 4, 4, 4],
                cross_attention_dim=64,
                norm_num_groups=8,
                use_linear_projection=True,
                upcast_attention=is_v,
            )
        ),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(folder: Path) -> StableDiffusionXLPipeline:
    first = _tokenizer(folder / "tokenizer", "<|endoftext|>")
    second = _tokenizer(folder / "tokenizer_2", "!")
    return StableDiffusionXLPipeline(
        vae=_vae(0.13025),
        text_encoder=_randomised(CLIPTextModel(_clip(len(first), "quick_gelu", 32, 2))),
        text_encoder_2=_randomised(
            CLIPTextModelWithProjection(_clip(len(second), "gelu", 64, 3, projection_dim=48))
        ),
        tokenizer=first,
        tokenizer_2=second,
        unet=_randomised(
            UNet2DConditionModel(
                sample_size=16,
                block_out_channels=(32, 64, 64),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                layers_per_block=1,
                attention_head_dim=[2, 4, 4],
                transformer_layers_per_block=[1, 2, 3],
                cross_attention_dim=96,
                norm_num_groups=8,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=16,
                projection_class_embeddings_input_dim=48 + 6 * 16,
            )
        ),
        scheduler=EulerDiscreteScheduler(**_BETAS, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=True,
    )


def _vae(scaling_factor: float) -> AutoencoderKL:
    return _randomised(
        AutoencoderKL(
            block_out_channels=(16, 16, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=4,
            scaling_factor=scaling_factor,
            sample_size=128,
        )
    )


def _clip(vocab_size: int, act: str, width: int, layers: int, **extra: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=4,
        num_hidden_layers=layers,
        hidden_act=act,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        **extra,
    )


def _tokenizer(folder: Path, pad_token: str) -> CLIPTokenizer:
    write_tiny_tokenizer(folder, pad_token)
    return CLIPTokenizer.from_pretrained(folder, pad_token=pad_token)


def _randomised(module: Any) -> Any:
    """Replace norms' ones and biases' zeros too, so that a swapped or unused one shows."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return module.eval()
