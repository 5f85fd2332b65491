"""A trained miniature as a Hugging Face pipeline folder: half-precision safetensors and configs."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from raydiff.mini.recipe import VAE, Recipe
from raydiff.mini.train_denoiser import Denoiser, encoder_config
from raydiff.mini.vocabulary import words
from raydiff.models.autoencoder_kl import AutoencoderKL
from raydiff.tokenizer import write_tiny_tokenizer


def save_tokenizers(recipe: Recipe, folder: Path) -> dict[str, Path]:
    """Write the tokenizer of each text encoder below `folder`; return them by encoder."""
    folders = {
        name: folder / name.replace("text_encoder", "tokenizer") for name in recipe.text_encoders
    }
    for name, tokenizer in folders.items():
        write_tiny_tokenizer(tokenizer, recipe.pad_tokens[name], words())
    return folders


def save_miniature(
    recipe: Recipe,
    folder: Path,
    vae: AutoencoderKL,
    denoiser: Denoiser,
    vocab_sizes: dict[str, int],
) -> None:
    """Write everything but the tokenizers, which training needed before."""
    _save_component(folder / "vae", VAE, vae, "diffusion_pytorch_model")
    _save_component(folder / "unet", recipe.unet, denoiser.unet, "diffusion_pytorch_model")
    for name, encoder in denoiser.text_encoders.items():
        config = encoder_config(recipe, name, vocab_sizes[name])
        _save_component(folder / name, config, encoder, "model")
    _write_json(folder / "scheduler" / "scheduler_config.json", recipe.scheduler)
    _write_json(folder / "model_index.json", _model_index(recipe))


def _save_component(folder: Path, config: dict[str, Any], module: nn.Module, stem: str) -> None:
    _write_json(folder / "config.json", config)
    tensors = {
        name: tensor.detach().to("cpu", torch.float16).contiguous()
        for name, tensor in module.state_dict().items()
    }
    save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})


def _model_index(recipe: Recipe) -> dict[str, Any]:
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline"
        if recipe.family == "sdxl"
        else "StableDiffusionPipeline",
        "scheduler": ["diffusers", recipe.scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    for name, config in recipe.text_encoders.items():
        index[name] = ["transformers", config["architectures"][0]]
        index[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    if recipe.has_zero_negative:
        return index | {"force_zeros_for_empty_prompt": True}
    return index | {
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
