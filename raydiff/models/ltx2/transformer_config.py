"""Shape of an LTX-2 transformer, as a diffusers `transformer/config.json` tells it.

LTX-2.0, 2.3 and 2.5 are one network with some options on or off.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from raydiff.errors import ModelError
from raydiff.models.options import check_options, positive

COMPONENT = "transformer"


@dataclass(frozen=True, kw_only=True, slots=True)
class LTX2TransformerConfig:
    """Shape of the transformer: a video stream and an audio stream, each with its own width."""

    in_channels: int
    out_channels: int
    num_heads: int
    head_dim: int
    audio_in_channels: int
    audio_out_channels: int
    audio_num_heads: int
    audio_head_dim: int
    num_layers: int
    norm_eps: float
    caption_channels: int | None
    """Width of the text that the transformer projects to its own widths (2.0); None where the text
    comes in those widths already (2.3)."""
    has_gated_attention: bool
    """A gate for each attention head and token (2.3)."""
    has_text_modulation: bool
    """Queries, keys and values of the text attentions are scaled and shifted (2.3)."""
    has_prompt_adaln: bool
    """With text modulation: keys and values also by the row's sigma, not only by a fixed table."""
    has_ff_bias: bool
    has_audio_ff_bias: bool
    has_keyframe_embedding: bool
    """A learned vector marks tokens whose latent frame stands for one pixel frame (2.5)."""
    timestep_scale_multiplier: float
    cross_timestep_scale_multiplier: float
    """Of the sigma that the audio-video gates see."""
    rope_type: Literal["split", "interleaved"]
    rope_theta: float
    has_double_precision_rope: bool
    max_seconds: int
    """Time span of the video's positions, -1 to 1 after scaling."""
    audio_max_seconds: int
    base_height: int
    base_width: int
    """Pixels that span the same range."""
    vae_scale_factors: tuple[int, int, int]
    """Pixel frames, rows and columns of one latent."""
    causal_offset: int
    audio_scale_factor: int
    """Mel frames of one audio latent."""
    audio_sampling_rate: int
    audio_hop_length: int

    @property
    def dim(self) -> int:
        """Width of the video stream."""
        return self.num_heads * self.head_dim

    @property
    def audio_dim(self) -> int:
        """Width of the audio stream, and of the attentions between the streams."""
        return self.audio_num_heads * self.audio_head_dim

    @property
    def has_step_dependent_text(self) -> bool:
        """Whether the text's keys and values change from step to step."""
        return self.has_text_modulation and self.has_prompt_adaln

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a diffusers `transformer/config.json`; an option we do not run is a ModelError."""
        check_options(COMPONENT, config, known=(*_DEFAULTS, *_WITHOUT_EFFECT), accepted=_ACCEPTED)
        options = {**_DEFAULTS, **config}
        caption_channels = positive(COMPONENT, options, "caption_channels")
        result = cls(
            in_channels=positive(COMPONENT, options, "in_channels"),
            out_channels=positive(COMPONENT, options, "out_channels", instead="in_channels"),
            num_heads=positive(COMPONENT, options, "num_attention_heads"),
            head_dim=_even(options, "attention_head_dim"),
            audio_in_channels=positive(COMPONENT, options, "audio_in_channels"),
            audio_out_channels=positive(
                COMPONENT, options, "audio_out_channels", instead="audio_in_channels"
            ),
            audio_num_heads=positive(COMPONENT, options, "audio_num_attention_heads"),
            audio_head_dim=_even(options, "audio_attention_head_dim"),
            num_layers=positive(COMPONENT, options, "num_layers"),
            norm_eps=options["norm_eps"],
            caption_channels=caption_channels if options["use_prompt_embeddings"] else None,
            has_gated_attention=_same_in_both(options, "gated_attn"),
            has_text_modulation=_same_in_both(options, "cross_attn_mod"),
            has_prompt_adaln=options["use_prompt_adaln_single"],
            has_ff_bias=options["ff_bias"],
            has_audio_ff_bias=options["audio_ff_bias"],
            has_keyframe_embedding=options["use_keyframes_abs_pos_embedding"],
            timestep_scale_multiplier=options["timestep_scale_multiplier"],
            cross_timestep_scale_multiplier=options["cross_attn_timestep_scale_multiplier"],
            rope_type=options["rope_type"],
            rope_theta=options["rope_theta"],
            has_double_precision_rope=options["rope_double_precision"],
            max_seconds=positive(COMPONENT, options, "pos_embed_max_pos"),
            audio_max_seconds=positive(COMPONENT, options, "audio_pos_embed_max_pos"),
            base_height=positive(COMPONENT, options, "base_height"),
            base_width=positive(COMPONENT, options, "base_width"),
            vae_scale_factors=_scale_factors(options),
            causal_offset=options["causal_offset"],
            audio_scale_factor=positive(COMPONENT, options, "audio_scale_factor"),
            audio_sampling_rate=positive(COMPONENT, options, "audio_sampling_rate"),
            audio_hop_length=positive(COMPONENT, options, "audio_hop_length"),
        )
        _check_text_widths(options, result)
        return result


_DEFAULTS: dict[str, Any] = {
    "in_channels": 128,
    "out_channels": 128,
    "num_attention_heads": 32,
    "attention_head_dim": 128,
    "cross_attention_dim": 4096,
    "vae_scale_factors": (8, 32, 32),
    "pos_embed_max_pos": 20,
    "base_height": 2048,
    "base_width": 2048,
    "gated_attn": False,
    "cross_attn_mod": False,
    "audio_in_channels": 128,
    "audio_out_channels": 128,
    "audio_num_attention_heads": 32,
    "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 2048,
    "audio_scale_factor": 4,
    "audio_pos_embed_max_pos": 20,
    "audio_sampling_rate": 16000,
    "audio_hop_length": 160,
    "audio_gated_attn": False,
    "audio_cross_attn_mod": False,
    "num_layers": 48,
    "norm_eps": 1e-6,
    "caption_channels": 3840,
    "rope_theta": 10000.0,
    "rope_double_precision": True,
    "causal_offset": 1,
    "timestep_scale_multiplier": 1000,
    "cross_attn_timestep_scale_multiplier": 1000,
    "rope_type": "interleaved",
    "use_prompt_embeddings": True,
    "ff_bias": True,
    "audio_ff_bias": True,
    "use_prompt_adaln_single": True,
    "use_keyframes_abs_pos_embedding": False,
}
"""What a config that leaves an option out means by it (diffusers' defaults)."""

_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "attention_out_bias": (True,),
    "audio_patch_size": (1,),
    "audio_patch_size_t": (1,),
    "norm_elementwise_affine": (False,),
    "patch_size": (1,),
    "patch_size_t": (1,),
    "qk_norm": ("rms_norm_across_heads",),
    "rope_type": ("split", "interleaved"),
}
"""Options of which we run only these values."""

_WITHOUT_EFFECT = ("perturbed_attn",)
"""Says that diffusers may perturb self attention; here any row of any model can ask for it."""


def _check_text_widths(options: Mapping[str, Any], config: LTX2TransformerConfig) -> None:
    """Text arrives in the width of the stream that attends to it."""
    widths = {"cross_attention_dim": config.dim, "audio_cross_attention_dim": config.audio_dim}
    for name, width in widths.items():
        if options[name] != width:
            raise ModelError(
                f"{COMPONENT} config: {name} is {options[name]!r}; only {width}, the number "
                "of attention heads times their dimension, can be run"
            )


def _same_in_both(options: Mapping[str, Any], name: str) -> bool:
    """The option's value in the video stream, which must be the audio stream's too."""
    video, audio = bool(options[name]), bool(options[f"audio_{name}"])
    if video != audio:
        raise ModelError(
            f"{COMPONENT} config: audio_{name} is {audio} and {name} is {video}; only one "
            "value for both can be run"
        )
    return video


def _scale_factors(options: Mapping[str, Any]) -> tuple[int, int, int]:
    factors = tuple(options["vae_scale_factors"])
    if len(factors) != 3:
        raise ModelError(
            f"{COMPONENT} config: vae_scale_factors is {list(factors)}; expected three "
            "numbers, of frames, rows and columns"
        )
    return factors


def _even(options: Mapping[str, Any], name: str) -> int:
    """A head dimension: rotary positions turn pairs of its channels."""
    value = positive(COMPONENT, options, name)
    if value % 2:
        raise ModelError(f"{COMPONENT} config: {name} is {value}; it must be even")
    return value
