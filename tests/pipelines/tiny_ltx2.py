"""Pipelines of the tiny LTX-2, 2.0 or 2.3, with random weights, and requests for its clips."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from raydiff.diffusion.flow_match import FlowMatchConfig
from raydiff.errors import RowError
from raydiff.gemma_tokenizer import GemmaTokenizer, write_tiny_gemma_tokenizer
from raydiff.manifest.video_rules import video_defaults, video_problems
from raydiff.memory.profiles import load_profile
from raydiff.models.ltx2.audio_vae import AudioVAEConfig
from raydiff.pipelines.ltx2.components import LTX2Components
from raydiff.pipelines.ltx2.pipeline import LTX2Pipeline
from raydiff.pipelines.tiny_ltx2 import CONFIGS, random_weight, tiny_modules
from raydiff.request import ModelInfo, RenderRequest, VideoModel
from raydiff.video_settings import VideoMode, VideoSettings
from raydiff.weights.published_ltx2 import SCHEDULER, LTX2Version

MAX_LENGTH = 32
"""Tokens of a text; real tokenizers have 1024."""

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
"""Of Gemma's image half, which the reference has."""

STORED_BUFFERS = ("latents_mean", "latents_std", "mel_basis", "forward_basis")
"""Those that checkpoints have and no config tells."""

M = TypeVar("M", bound=nn.Module)


def two_stage_modules(version: LTX2Version, vocab_size: int) -> dict[str, nn.Module]:
    """Return the tiny checkpoint's modules, and one more transformer for second stages."""
    modules = tiny_modules(version, vocab_size)
    transformer = tiny_modules(version, vocab_size)["transformer"]
    return {**modules, "refine_transformer": transformer}


def tiny_components(
    version: LTX2Version, folder: Path, modules: dict[str, nn.Module] | None = None
) -> LTX2Components:
    """Return components with random weights, or the given modules'; `folder` gets a tokenizer."""
    vocab_size = write_tiny_gemma_tokenizer(folder, max_length=MAX_LENGTH)
    if modules is None:
        torch.manual_seed(0)
        modules = {
            name: randomised(module)
            for name, module in two_stage_modules(version, vocab_size).items()
        }
    parts: dict[str, Any] = dict(modules)
    return LTX2Components(
        **parts,
        tokenizer=GemmaTokenizer.from_folder(folder),
        audio_config=AudioVAEConfig.from_dict(CONFIGS[version]["audio_vae"]),
        schedule=FlowMatchConfig.from_dict(SCHEDULER),
        num_text_embeds=MAX_LENGTH,
    )


def tiny_info(parts: LTX2Components, version: LTX2Version = "2.0") -> ModelInfo:
    """Return what validation knows of a tiny checkpoint."""
    num_layers = CONFIGS[version]["transformer"]["num_layers"]
    return ModelInfo(
        name="tiny-ltx2",
        family="ltx2",
        path="",
        revision="local-0",
        tasks=("txt2vid", "img2vid"),
        default_height=512,
        default_width=768,
        size_multiple=32,
        default_num_inference_steps=40 if version == "2.0" else 30,
        default_guidance_scale=3.0,
        default_strength=1.0,
        default_sampler="euler",
        num_parameters={},
        samplers=("euler",),
        video=VideoModel(
            num_layers=num_layers,
            default_stg_block=num_layers - 1,
            spatial_downscale=32,
            temporal_downscale=8,
            has_upsampler=parts.latent_upsampler is not None,
        ),
    )


def tiny_pipeline(
    parts: LTX2Components, version: LTX2Version = "2.0", **profile: Any
) -> LTX2Pipeline:
    """Return a pipeline on the CPU; `profile` are changes to the cpu_only profile."""
    return LTX2Pipeline(
        info=tiny_info(parts, version),
        components=parts,
        profile=replace(load_profile("cpu_only"), **profile),
        dtype=torch.float32,
    )


def clip_request(
    pipeline: LTX2Pipeline, prompt: str, mode: VideoMode = "one_stage", **values: Any
) -> RenderRequest:
    """Return a request with the official pipeline's values where none is given."""
    defaults = {"negative_prompt": None, "init_image": None, **video_defaults(pipeline.info, mode)}
    given = {name: value for name, value in values.items() if value is not None}
    merged = {**defaults, "text_encoder": "gemma3", **given}
    problems = list(video_problems(merged, pipeline.info, given))
    if problems:
        raise RowError(" ".join(problems))
    settings = VideoSettings(
        **{field.name: merged.pop(field.name) for field in fields(VideoSettings)}
    )
    return RenderRequest(
        model=pipeline.info.name,
        model_revision=pipeline.info.revision,
        task="txt2vid" if merged["init_image"] is None else "img2vid",
        prompt=prompt,
        sampler="euler",
        video=settings,
        **merged,
    )


@torch.no_grad()
def randomised(module: M) -> M:
    """Replace ones and zeros too (norms, biases, tables, statistics): one unused would not show."""
    stored = [(name, b) for name, b in module.named_buffers() if name.endswith(STORED_BUFFERS)]
    for name, tensor in (*module.named_parameters(), *stored):
        tensor.copy_(random_weight(name, tensor))
    return module.eval()
