"""Write a pipeline as a folder in Hugging Face layout, a component at a time."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def save_component(folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the config.json and the weights of the component that `folder` is named after."""
    _write_json(folder / "config.json", config)
    is_encoder = folder.name.startswith("text_encoder")
    stem = "model" if is_encoder else "diffusion_pytorch_model"
    save_file(dict(tensors), folder / f"{stem}.safetensors", metadata={"format": "pt"})


def save_index(
    folder: Path,
    text_encoders: Mapping[str, Mapping[str, Any]],
    scheduler: dict[str, Any],
    *,
    is_sdxl: bool,
) -> None:
    """Write Stable Diffusion's scheduler and model_index.json; `text_encoders` are configs by
    name."""
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if is_sdxl else "StableDiffusionPipeline",
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    for name, config in text_encoders.items():
        index[name] = ["transformers", config["architectures"][0]]
        index[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    if is_sdxl:
        index["force_zeros_for_empty_prompt"] = True
    else:
        index |= {
            "feature_extractor": [None, None],
            "safety_checker": [None, None],
            "requires_safety_checker": False,
        }
    write_index(folder, index, scheduler)


def write_index(folder: Path, index: dict[str, Any], scheduler: dict[str, Any]) -> None:
    """Write the scheduler's config and model_index.json, which lists the components' classes."""
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_json(folder / "model_index.json", index)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
