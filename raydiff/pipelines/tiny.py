"""Tiny random-weight pipelines in Hugging Face layout, for demos and tests without a download.

Their images and clips are noise; everything else (files, names, code path) is as in the real
checkpoint.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raydiff.errors import OutputError
from raydiff.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from raydiff.models.clip import CLIPTextConfig, CLIPTextEncoder
from raydiff.models.unet import UNet, UNetConfig
from raydiff.pipelines.save import save_component, save_index
from raydiff.pipelines.tiny_ltx2 import write_tiny_ltx2
from raydiff.tokenizer import write_tiny_tokenizer
from raydiff.weights.published_ltx2 import LTX2Version

TinyFamily = Literal["sd21", "sdxl", "ltx2", "ltx2.3"]
ImageFamily = Literal["sd21", "sdxl"]
LTX2_VERSIONS: dict[TinyFamily, LTX2Version] = {"ltx2": "2.0", "ltx2.3": "2.3"}

VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [8, 8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 64,
}

UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "norm_eps": 1e-5,
    "sample_size": 8,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "use_linear_projection": True,
    "cross_attention_dim": 32,
    "attention_head_dim": [2, 4],
    "block_out_channels": [16, 32],
}

CLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 77,
    "layer_norm_eps": 1e-5,
    "model_type": "clip_text_model",
}

SD21_SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}

SDXL_SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
}


def make_tiny(family: TinyFamily, folder: str | Path, seed: int = 0) -> Path:
    """Write a tiny `family` pipeline with random weights into an empty folder: 1 MB, or LTX-2's
    12 MB.

    The same family and seed give the same files. Raises OutputError when the folder holds
    something else.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder} is not empty; name a new folder for the tiny pipeline")
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    if family == "ltx2" or family == "ltx2.3":
        write_tiny_ltx2(folder, LTX2_VERSIONS[family], generator)
    else:
        _write_images(family, folder, generator)
    return folder


def _write_images(family: ImageFamily, folder: Path, generator: torch.Generator) -> None:
    encoders = {"text_encoder": CLIP | {"architectures": ["CLIPTextModel"]}}
    if family == "sdxl":
        encoders["text_encoder_2"] = CLIP | {
            "architectures": ["CLIPTextModelWithProjection"],
            "projection_dim": 32,
        }
    for name, config in encoders.items():
        pad_token = "<|endoftext|>" if (family, name) == ("sdxl", "text_encoder") else "!"
        tokenizer = folder / name.replace("text_encoder", "tokenizer")
        vocab_size = write_tiny_tokenizer(tokenizer, pad_token)
        hidden_act = "quick_gelu" if (family, name) == ("sdxl", "text_encoder") else "gelu"
        config |= {
            "vocab_size": vocab_size,
            "hidden_act": hidden_act,
            "bos_token_id": vocab_size - 2,
            "eos_token_id": vocab_size - 1,
        }
        encoder = CLIPTextEncoder(CLIPTextConfig.from_dict(config))
        save_component(folder / name, config, _random_weights(encoder, generator))
    unet_config = _unet_config(family)
    unet = UNet(UNetConfig.from_dict(unet_config))
    save_component(folder / "unet", unet_config, _random_weights(unet, generator))
    vae_config = VAE | {"scaling_factor": 0.13025 if family == "sdxl" else 0.18215}
    vae = AutoencoderKL(AutoencoderKLConfig.from_dict(vae_config))
    save_component(folder / "vae", vae_config, _random_weights(vae, generator))
    scheduler = SDXL_SCHEDULER if family == "sdxl" else SD21_SCHEDULER
    save_index(folder, encoders, scheduler, is_sdxl=family == "sdxl")


def _unet_config(family: ImageFamily) -> dict[str, Any]:
    if family == "sd21":
        return UNET | {
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        }
    return UNET | {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2],
        "cross_attention_dim": 64,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
    }


def _random_weights(module: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        name: _random_weight(name, tensor, generator)
        for name, tensor in module.state_dict().items()
    }


def _random_weight(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Keep activations near unit size: weights by fan-in, norms about one, biases small."""
    noise = torch.randn(tensor.shape, generator=generator)
    if tensor.ndim > 1:
        return noise.div(tensor[0].numel() ** 0.5)
    return 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
