"""What the miniatures are made of and how they are trained: architectures in the words of the
published checkpoints' own config files, schedules, batch sizes, seeds."""

from dataclasses import dataclass, field
from typing import Any, Literal

from raydiff.pipelines import tiny

MiniFamily = Literal["sd21", "sdxl"]
FAMILIES: tuple[MiniFamily, ...] = ("sd21", "sdxl")

LATENT_SIZE = 16
MAX_TOKENS = 32
"""Captions have up to 21, bos and eos included; attention to the padding of 77 takes training half
of its time."""

VAE: dict[str, Any] = tiny.VAE | {
    "block_out_channels": [16, 32, 40, 40],
    "norm_num_groups": 8,
    "sample_size": 128,
    # The channels are whitened inside the two 1x1 convolutions at the latents.
    "scaling_factor": 1.0,
}

_UNET: dict[str, Any] = tiny.UNET | {
    "sample_size": LATENT_SIZE,
    "block_out_channels": [40, 80],
    "attention_head_dim": [5, 5],
}

_CLIP: dict[str, Any] = tiny.CLIP | {
    "architectures": ["CLIPTextModel"],
    "max_position_embeddings": MAX_TOKENS,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
}

BETA_END = 0.02
"""Where the large models have 0.012: a 16x16 latent still shows its mean colour through the noise
of 0.012's last step, and a render starts from noise alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One miniature."""

    family: MiniFamily
    unet: dict[str, Any]
    text_encoders: dict[str, dict[str, Any]]
    scheduler: dict[str, Any]
    has_zero_negative: bool
    pad_tokens: dict[str, str]
    """By text encoder; SDXL's two differ."""
    num_steps: int = 22_000
    batch_size: int = 512
    learning_rate: float = 1.5e-3
    warmup_steps: int = 500
    ema_decay: float = 0.9995
    max_error_weight: float = 100.0
    """Of predicted noise: an error in it makes one of 1 / alpha times its square in what the other
    kind of prediction says, and counts as much, up to this. Layout is decided at high noise."""
    slot_weight: float = 0.1
    """Of the text encoders' own loss, see `slots`."""
    caption_dropout: float = 0.1
    """How often a caption is left out, for guidance."""
    seed: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderRecipe:
    """The autoencoder that both miniatures share."""

    config: dict[str, Any] = field(default_factory=lambda: dict(VAE))
    num_steps: int = 12_000
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 500
    ema_decay: float = 0.999
    kl_weight: float = 1e-6
    """Of a sum over a picture's latents. With ten times as much, a channel was left without use,
    and its noise drowned what an image brings into img2img."""
    edge_weight: float = 1.0
    """Of the difference between neighbouring pixels' differences: it keeps edges sharp."""
    seed: int = 0


NUM_SCENES = 400_000
CAPTIONS_PER_SCENE = 2
DATA_SEED = 20_000

RECIPES: dict[MiniFamily, Recipe] = {
    "sd21": Recipe(
        family="sd21",
        unet=_UNET
        | {
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
            "cross_attention_dim": 72,
        },
        text_encoders={
            "text_encoder": _CLIP
            | {
                "hidden_size": 72,
                "intermediate_size": 288,
                "num_hidden_layers": 3,
                "num_attention_heads": 6,
            }
        },
        scheduler=tiny.SD21_SCHEDULER | {"beta_end": BETA_END},
        has_zero_negative=False,
        pad_tokens={"text_encoder": "!"},
    ),
    "sdxl": Recipe(
        family="sdxl",
        unet=_UNET
        | {
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 1],
            "cross_attention_dim": 128,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64 + 6 * 8,
        },
        text_encoders={
            "text_encoder": _CLIP
            | {
                "hidden_size": 64,
                "intermediate_size": 256,
                "num_hidden_layers": 3,
                "hidden_act": "quick_gelu",
            },
            "text_encoder_2": _CLIP
            | {
                "architectures": ["CLIPTextModelWithProjection"],
                "hidden_size": 64,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "projection_dim": 64,
            },
        },
        scheduler=tiny.SDXL_SCHEDULER | {"beta_end": BETA_END},
        has_zero_negative=True,
        num_steps=32_000,
        pad_tokens={"text_encoder": "<|endoftext|>", "text_encoder_2": "!"},
    ),
}
