"""Tiny random pipelines in diffusers layout, every component saved by diffusers or transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

SD21_SCHEDULER = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
SDXL_SCHEDULER = {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon"}


def components(family: str, seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    text: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 50,
        "bos_token_id": 48,
        "eos_token_id": 49,
        "projection_dim": 12,
    }
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 60,
    }
    modules: dict[str, Any] = {
        "unet": UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            attention_head_dim=(2, 4),
            cross_attention_dim=16,
            norm_num_groups=8,
            use_linear_projection=True,
            **(added if family == "sdxl" else {}),
        ),
        "vae": AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=16,
        ),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**text)),
    }
    if family == "sdxl":
        modules["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**text))
    return modules


def save_folder(
    folder: Path, family: str, *, seed: int = 0, variants: tuple[str | None, ...] = (None,)
) -> dict[str, dict[str, torch.Tensor]]:
    """Save a pipeline and return {component: {name in diffusers: tensor}}."""
    modules = components(family, seed)
    for name, module in modules.items():
        for variant in variants:
            module.to(torch.float16 if variant == "fp16" else torch.float32)
            module.save_pretrained(folder / name, variant=variant)
    save_small_files(folder, family)
    return {name: module.state_dict() for name, module in modules.items()}


def save_small_files(folder: Path, family: str) -> None:
    """Save model_index.json, scheduler and (dummy) tokenizers."""
    is_xl = family == "sdxl"
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if is_xl:
        index |= {
            "force_zeros_for_empty_prompt": True,
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
    write_json(folder / "model_index.json", index)
    write_json(
        folder / "scheduler" / "scheduler_config.json", SDXL_SCHEDULER if is_xl else SD21_SCHEDULER
    )
    for name in ("tokenizer", "tokenizer_2") if is_xl else ("tokenizer",):
        write_json(folder / name / "vocab.json", {f"{name}</w>": 0})
        (folder / name / "merges.txt").write_text(f"#version: 0.2\n# {name}\n")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
