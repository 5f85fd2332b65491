"""A tiny LTX-2 with random weights, 2.0 or 2.3, laid out as the published checkpoints."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raydiff.gemma_tokenizer import write_tiny_gemma_tokenizer
from raydiff.pipelines.ltx2.modules import BUILDERS
from raydiff.pipelines.save_ltx2 import gemma_config, save_ltx2
from raydiff.weights.published_ltx2 import LTX2Version

MAX_TOKENS = 128
"""Of a text; published tokenizers have 1024."""

GEMMA: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "query_pre_attn_scalar": 12,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_TRANSFORMER: dict[str, Any] = {
    "_class_name": "LTX2VideoTransformer3DModel",
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "cross_attention_dim": 64,
    "audio_in_channels": 16,
    "audio_out_channels": 16,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 32,
    "num_layers": 3,
    "caption_channels": 24,
    "rope_type": "split",
    # Says only that diffusers may leave out self attention: with false its STG does nothing.
    "perturbed_attn": True,
}
_CONNECTORS: dict[str, Any] = {
    "_class_name": "LTX2TextConnectors",
    "rope_type": "split",
    "caption_channels": 24,
    "text_proj_in_factor": 4,
    "video_connector_num_attention_heads": 3,
    "video_connector_attention_head_dim": 8,
    "video_connector_num_learnable_registers": 8,
    "audio_connector_num_attention_heads": 2,
    "audio_connector_attention_head_dim": 12,
    "audio_connector_num_learnable_registers": 8,
}
_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLLTX2Video",
    "latent_channels": 16,
    "block_out_channels": [16, 32, 64, 64],
    "layers_per_block": [1, 1, 1, 1, 1],
    "decoder_causal": False,
    "decoder_block_out_channels": [16, 32, 64],
    "decoder_layers_per_block": [1, 1, 1, 1],
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
_AUDIO_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLLTX2Audio",
    "base_channels": 16,
    "ch_mult": [1, 2, 3],
    "num_res_blocks": 1,
    "latent_channels": 4,
    "mel_bins": 16,
}
_VOCODER: dict[str, Any] = {
    "_class_name": "LTX2Vocoder",
    "in_channels": 32,
    "hidden_channels": 16,
    "upsample_kernel_sizes": [32, 31],
    "upsample_factors": [16, 15],
    "resnet_kernel_sizes": [3],
    "resnet_dilations": [[1, 3]],
}
_UPSAMPLER: dict[str, Any] = {
    "_class_name": "LTX2LatentUpsamplerModel",
    "in_channels": 16,
    "mid_channels": 32,
    "num_blocks_per_stage": 1,
}

_GATED = {"gated_attn": True, "audio_gated_attn": True}
_TRANSFORMER_23 = {
    **_TRANSFORMER,
    **_GATED,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
}
_CONNECTORS_23 = {
    **_CONNECTORS,
    "per_modality_projections": True,
    "proj_bias": True,
    "video_hidden_dim": 64,
    "video_gated_attn": True,
    "video_connector_num_attention_heads": 4,
    "video_connector_attention_head_dim": 16,
    "audio_hidden_dim": 32,
    "audio_gated_attn": True,
    "audio_connector_num_attention_heads": 4,
    "audio_connector_attention_head_dim": 8,
}
_VAE_23 = {
    **_VAE,
    "decoder_block_out_channels": [16, 32, 32, 64],
    "decoder_layers_per_block": [1, 1, 1, 1, 1],
    "decoder_spatio_temporal_scaling": [True] * 4,
    "decoder_inject_noise": [False] * 5,
    "upsample_type": ["spatiotemporal", "spatiotemporal", "temporal", "spatial"],
    "upsample_residual": [False] * 4,
    "upsample_factor": [2, 2, 1, 2],
    "decoder_spatial_padding_mode": "zeros",
}
_VOCODER_23: dict[str, Any] = {
    **_VOCODER,
    "_class_name": "LTX2VocoderWithBWE",
    "upsample_kernel_sizes": [32, 20],
    "upsample_factors": [16, 10],
    "bwe_in_channels": 10,
    "bwe_hidden_channels": 16,
    "bwe_upsample_kernel_sizes": [8, 5],
    "bwe_upsample_factors": [4, 3],
    "bwe_resnet_kernel_sizes": [3],
    "bwe_resnet_dilations": [[1, 2]],
    "filter_length": 16,
    "hop_length": 4,
    "window_length": 16,
    "num_mel_channels": 5,
}

CONFIGS: dict[LTX2Version, dict[str, dict[str, Any]]] = {
    "2.0": {
        "transformer": _TRANSFORMER,
        "connectors": _CONNECTORS,
        "vae": _VAE,
        "audio_vae": _AUDIO_VAE,
        "vocoder": _VOCODER,
        "latent_upsampler": _UPSAMPLER,
    },
    "2.3": {
        "transformer": _TRANSFORMER_23,
        "connectors": _CONNECTORS_23,
        "vae": _VAE_23,
        "audio_vae": _AUDIO_VAE,
        "vocoder": _VOCODER_23,
        "latent_upsampler": {**_UPSAMPLER, "use_rational_resampler": False},
    },
}
"""By component; Gemma's is GEMMA in both."""


def write_tiny_ltx2(folder: Path, version: LTX2Version, generator: torch.Generator) -> None:
    """Write a pipeline folder, about 12 MB."""
    vocab_size = write_tiny_gemma_tokenizer(folder / "tokenizer", max_length=MAX_TOKENS)
    configs = CONFIGS[version] | {"text_encoder": gemma_config(GEMMA, vocab_size)}
    tensors = {
        name: {
            key: random_weight(key, tensor, generator)
            for key, tensor in module.state_dict().items()
        }
        for name, module in tiny_modules(version, vocab_size).items()
    }
    save_ltx2(folder, configs, tensors)


def tiny_modules(version: LTX2Version, vocab_size: int) -> dict[str, nn.Module]:
    """Return modules of the configs by component; their weights mean nothing yet."""
    configs = {"text_encoder": gemma_config(GEMMA, vocab_size), **CONFIGS[version]}
    return {name: BUILDERS[name](config) for name, config in configs.items()}


def random_weight(name: str, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return a weight with which frames are colourful and sound is heard and not cut: activations
    stay near unit size, and no norm, bias or statistic is at its neutral value."""
    noise = torch.randn(like.shape, generator=generator)
    leaf = name.rpartition(".")[2]
    if leaf == "latents_std":
        return 1 + 0.2 * noise.clamp(-2, 2)
    if leaf in ("filter", "mel_basis"):  # Of sound: they let low frequencies through.
        return noise.abs() / noise.abs().sum(dim=-1, keepdim=True)
    if leaf == "latents_mean":
        return noise
    if "table" in name or "registers" in name or "embed_tokens" in name:
        return 0.5 * noise
    if like.ndim > 1:
        return noise * (_gain(name) / math.sqrt(_fan_in(name, like)))
    return 0.2 * noise + float("norm" in name and leaf == "weight")


def _fan_in(name: str, like: Tensor) -> int:
    """Return how many inputs an output has: of a transposed convolution, two kernel taps each."""
    is_transposed = like.ndim == 3 and "upsamplers" in name
    return 2 * like.shape[0] if is_transposed else like[0].numel()


def _gain(name: str) -> float:
    """Keep what comes out of vocoders within -1 and 1, where 2.3's two add up and are cut."""
    if name.endswith(".conv_out.weight"):
        return 0.1
    return 0.5 if name == "conv_out.weight" else 1.0
