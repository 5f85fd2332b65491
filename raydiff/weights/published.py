"""The configs of SD 2.1 and SDXL base as published, for original single files, which carry none.

What tensor shapes show (widths, depths) is read from the shapes and lies over the published values,
so that a smaller or deeper relative of the family loads too.
"""

from collections.abc import Mapping
from typing import Any, Literal

from raydiff.errors import ModelError
from raydiff.weights.sources import TensorSource

PredictionType = Literal["epsilon", "v_prediction"]
Config = dict[str, Any]
Sources = Mapping[str, TensorSource]

HEAD_DIM = 64
"""Channels of one attention head, in every UNet and text encoder of both families."""

_UNET: Config = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "use_linear_projection": True,
}

_VAE: Config = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}

_TEXT_ENCODER: Config = {
    "architectures": ["CLIPTextModel"],
    "bos_token_id": 0,
    "eos_token_id": 2,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "pad_token_id": 1,
    "vocab_size": 49408,
}

_SCHEDULER: Config = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
}

SD21: dict[str, Config] = {
    "model_index": {"_class_name": "StableDiffusionPipeline"},
    "scheduler": _SCHEDULER | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    "text_encoder": _TEXT_ENCODER
    | {
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "projection_dim": 512,
    },
    "unet": _UNET
    | {
        "attention_head_dim": [5, 10, 20, 20],
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 1024,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "sample_size": 96,
        "transformer_layers_per_block": [1, 1, 1, 1],
        "upcast_attention": True,
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    },
    "vae": _VAE | {"sample_size": 768, "scaling_factor": 0.18215},
}
"""stable-diffusion-2-1: 768x768, v-prediction."""

SD21_BASE: dict[str, Config] = {
    "scheduler": _SCHEDULER | {"_class_name": "PNDMScheduler", "prediction_type": "epsilon"},
    "unet": {"sample_size": 64, "upcast_attention": False},
}
"""Where stable-diffusion-2-1-base differs: 512x512, epsilon."""

SDXL: dict[str, Config] = {
    "model_index": {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
    },
    "scheduler": _SCHEDULER
    | {
        "_class_name": "EulerDiscreteScheduler",
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "use_karras_sigmas": False,
    },
    "text_encoder": _TEXT_ENCODER
    | {
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "projection_dim": 768,
    },
    "text_encoder_2": _TEXT_ENCODER
    | {
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
    },
    "unet": _UNET
    | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
    },
    "vae": _VAE | {"force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025},
}
"""stable-diffusion-xl-base-1.0: 1024x1024, epsilon."""

PUBLISHED = {"sd21": SD21, "sdxl": SDXL}


def single_file_configs(
    family: str,
    sources: Mapping[str, Sources],
    prediction_type: PredictionType,
    *,
    has_zero_terminal_snr: bool = False,
) -> dict[str, Config]:
    """Return {component: config} of an original single file, with `scheduler` and `model_index`."""
    configs = {name: dict(config) for name, config in PUBLISHED[family].items()}
    if family == "sd21" and prediction_type == "epsilon":
        configs["scheduler"] = dict(SD21_BASE["scheduler"])
        configs["unet"] |= SD21_BASE["unet"]
    configs["scheduler"] |= {
        "prediction_type": prediction_type,
        "rescale_betas_zero_snr": has_zero_terminal_snr,
    }
    configs["unet"] |= _unet_sizes(sources["unet"])
    configs["vae"] |= _vae_sizes(sources["vae"])
    for name in sources:
        if name.startswith("text_encoder"):
            configs[name] |= _text_encoder_sizes(sources[name])
    return configs


def _unet_sizes(sources: Sources) -> Config:
    channels = _level_widths(sources, "down_blocks.{}.resnets.0.conv1.weight")
    depths = [
        _count(sources, f"down_blocks.{level}.attentions.0.transformer_blocks.")
        for level in range(len(channels))
    ]
    sizes: Config = {
        "in_channels": shape_of(sources, "conv_in.weight")[1],
        "block_out_channels": channels,
        "attention_head_dim": [max(1, width // HEAD_DIM) for width in channels],
        "cross_attention_dim": shape_of(
            sources, "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
        )[1],
        "down_block_types": [
            "CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths
        ],
        "up_block_types": [
            "CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)
        ],
        "transformer_layers_per_block": [depth or 1 for depth in depths],
    }
    projection = "add_embedding.linear_1.weight"
    if projection in sources:
        sizes["projection_class_embeddings_input_dim"] = shape_of(sources, projection)[1]
    return sizes


def _vae_sizes(sources: Sources) -> Config:
    channels = _level_widths(sources, "encoder.down_blocks.{}.resnets.0.conv1.weight")
    return {
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    }


def _text_encoder_sizes(sources: Sources) -> Config:
    vocab_size, hidden_size = shape_of(sources, "text_model.embeddings.token_embedding.weight")
    max_positions, _ = shape_of(sources, "text_model.embeddings.position_embedding.weight")
    sizes: Config = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": shape_of(sources, "text_model.encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": _count(sources, "text_model.encoder.layers."),
        "num_attention_heads": max(1, hidden_size // HEAD_DIM),
        "max_position_embeddings": max_positions,
    }
    if "text_projection.weight" in sources:
        sizes["projection_dim"] = shape_of(sources, "text_projection.weight")[0]
    return sizes


def shape_of(sources: Sources, name: str) -> tuple[int, ...]:
    """Return the shape of a matrix or a convolution that tells a size of the network."""
    source = sources.get(name)
    if source is None or len(source.shape) < 2:
        found = "is missing" if source is None else f"has shape {list(source.shape)}"
        raise ModelError(
            f"single file: tensor {name} {found}; its size is read from there. "
            "The file is incomplete: download or copy it again"
        )
    return source.shape


def _level_widths(sources: Sources, pattern: str) -> list[int]:
    """Return the output channels of each level, from the finest to the coarsest."""
    widths: list[int] = []
    while (source := sources.get(pattern.format(len(widths)))) is not None:
        widths.append(source.shape[0])
    return widths


def _count(sources: Sources, prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in sources if name.startswith(prefix)})
