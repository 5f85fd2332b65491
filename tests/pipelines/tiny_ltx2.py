"""A tiny LTX-2, 2.0 or 2.3: the configs of its components, and pipelines with random weights."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from raydiff.diffusion.flow_match import FlowMatchConfig
from raydiff.errors import RowError
from raydiff.gemma_tokenizer import GemmaTokenizer, write_tiny_gemma_tokenizer
from raydiff.manifest.video_rules import video_defaults, video_problems
from raydiff.memory.profiles import load_profile
from raydiff.models.gemma3 import Gemma3Config, Gemma3TextEncoder
from raydiff.models.ltx2.audio_vae import AudioVAE, AudioVAEConfig
from raydiff.models.ltx2.connectors import LTX2Connectors, LTX2ConnectorsConfig
from raydiff.models.ltx2.transformer import LTX2Transformer
from raydiff.models.ltx2.transformer_config import LTX2TransformerConfig
from raydiff.models.ltx2.upsampler import LTX2Upsampler, LTX2UpsamplerConfig
from raydiff.models.ltx2.video_vae import LTX2VideoVAE
from raydiff.models.ltx2.video_vae_config import LTX2VideoVAEConfig
from raydiff.models.ltx2.vocoder import build_vocoder
from raydiff.pipelines.ltx2 import LTX2Pipeline
from raydiff.pipelines.ltx2_components import LTX2Components
from raydiff.request import ModelInfo, RenderRequest, VideoModel
from raydiff.video_settings import VideoMode, VideoSettings

Version = Literal["2.0", "2.3"]

MAX_LENGTH = 32
"""Tokens of a text; real tokenizers have 1024."""

SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}
"""Of the published checkpoints."""

GEMMA = {
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
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_TRANSFORMER = {
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
_CONNECTORS = {
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
_VAE = {
    "latent_channels": 16,
    "block_out_channels": [16, 32, 64, 64],
    "layers_per_block": [1, 1, 1, 1, 1],
    "decoder_causal": False,
    "decoder_block_out_channels": [16, 32, 64],
    "decoder_layers_per_block": [1, 1, 1, 1],
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
_AUDIO_VAE = {
    "base_channels": 16,
    "ch_mult": [1, 2, 3],
    "num_res_blocks": 1,
    "latent_channels": 4,
    "mel_bins": 16,
}
_VOCODER: dict[str, Any] = {
    "in_channels": 32,
    "hidden_channels": 16,
    "upsample_kernel_sizes": [7, 4],
    "upsample_factors": [3, 2],
    "resnet_kernel_sizes": [3],
    "resnet_dilations": [[1, 3]],
}
_UPSAMPLER: dict[str, Any] = {
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


CONFIGS: dict[Version, dict[str, dict[str, Any]]] = {
    "2.0": {
        "transformer": _TRANSFORMER,
        "connectors": _CONNECTORS,
        "vae": _VAE,
        "audio_vae": _AUDIO_VAE,
        "vocoder": {**_VOCODER, "_class_name": "LTX2Vocoder"},
        "latent_upsampler": _UPSAMPLER,
    },
    "2.3": {
        "transformer": _TRANSFORMER_23,
        "connectors": _CONNECTORS_23,
        "vae": _VAE_23,
        "audio_vae": _AUDIO_VAE,
        "vocoder": {**_VOCODER_23, "_class_name": "LTX2VocoderWithBWE"},
        "latent_upsampler": {**_UPSAMPLER, "use_rational_resampler": False},
    },
}
"""By component."""

M = TypeVar("M", bound=nn.Module)


def tiny_modules(version: Version, vocab_size: int) -> dict[str, nn.Module]:
    """Return our modules of the configs, as `LTX2Components` names them."""
    configs = CONFIGS[version]
    transformer = LTX2TransformerConfig.from_dict(configs["transformer"])
    return {
        "text_encoder": Gemma3TextEncoder(
            Gemma3Config.from_dict({**GEMMA, "vocab_size": vocab_size})
        ),
        "connectors": LTX2Connectors(LTX2ConnectorsConfig.from_dict(configs["connectors"])),
        "transformer": LTX2Transformer(transformer),
        "refine_transformer": LTX2Transformer(transformer),
        "vae": LTX2VideoVAE(LTX2VideoVAEConfig.from_dict(configs["vae"])),
        "latent_upsampler": LTX2Upsampler(
            LTX2UpsamplerConfig.from_dict(configs["latent_upsampler"])
        ),
        "audio_vae": AudioVAE(AudioVAEConfig.from_dict(configs["audio_vae"])),
        "vocoder": build_vocoder(configs["vocoder"]),
    }


def tiny_components(
    version: Version, folder: Path, modules: dict[str, nn.Module] | None = None
) -> LTX2Components:
    """Return components with random weights, or the given modules'; `folder` gets a tokenizer."""
    vocab_size = write_tiny_gemma_tokenizer(folder, max_length=MAX_LENGTH)
    if modules is None:
        torch.manual_seed(0)
        modules = {
            name: randomised(module) for name, module in tiny_modules(version, vocab_size).items()
        }
    parts: dict[str, Any] = dict(modules)
    return LTX2Components(
        **parts,
        tokenizer=GemmaTokenizer.from_folder(folder),
        audio_config=AudioVAEConfig.from_dict(CONFIGS[version]["audio_vae"]),
        schedule=FlowMatchConfig.from_dict(SCHEDULER),
        num_text_embeds=MAX_LENGTH,
    )


def tiny_info(parts: LTX2Components, version: Version = "2.0") -> ModelInfo:
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


def tiny_pipeline(parts: LTX2Components, version: Version = "2.0", **profile: Any) -> LTX2Pipeline:
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
    for name, parameter in module.named_parameters():
        parameter.copy_(_random(name, parameter))
    if hasattr(module, "latents_mean"):
        module.latents_mean.copy_(torch.randn(module.latents_mean.shape))
        module.latents_std.copy_(0.5 + torch.rand(module.latents_std.shape))
    return module.eval()


def _random(name: str, like: Tensor) -> Tensor:
    noise = torch.randn(like.shape)
    if "table" in name or "registers" in name or "embed_tokens" in name:
        return 0.5 * noise
    if like.ndim == 3:
        # The vocoder's: its sound is to stay within -1..1, where nothing is cut.
        return 0.6 * noise / like[0].numel() ** 0.5
    if like.ndim > 1:
        return noise / like[0].numel() ** 0.5
    return 0.2 * noise + float("norm" in name and name.endswith("weight"))
