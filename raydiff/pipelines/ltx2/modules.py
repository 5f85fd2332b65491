"""LTX-2's modules from their configs in diffusers layout."""

from collections.abc import Callable
from typing import Any

from torch import nn

from raydiff.models.gemma3 import Gemma3Config, Gemma3TextEncoder
from raydiff.models.ltx2.audio_vae import AudioVAE, AudioVAEConfig
from raydiff.models.ltx2.connectors import LTX2Connectors, LTX2ConnectorsConfig
from raydiff.models.ltx2.transformer import LTX2Transformer
from raydiff.models.ltx2.transformer_config import LTX2TransformerConfig
from raydiff.models.ltx2.upsampler import LTX2Upsampler, LTX2UpsamplerConfig
from raydiff.models.ltx2.video_vae import LTX2VideoVAE
from raydiff.models.ltx2.video_vae_config import LTX2VideoVAEConfig
from raydiff.models.ltx2.vocoder import build_vocoder


def build_text_encoder(config: dict[str, Any]) -> Gemma3TextEncoder:
    return Gemma3TextEncoder(Gemma3Config.from_dict(config))


def build_connectors(config: dict[str, Any]) -> LTX2Connectors:
    return LTX2Connectors(LTX2ConnectorsConfig.from_dict(config))


def build_transformer(config: dict[str, Any]) -> LTX2Transformer:
    return LTX2Transformer(LTX2TransformerConfig.from_dict(config))


def build_vae(config: dict[str, Any]) -> LTX2VideoVAE:
    return LTX2VideoVAE(LTX2VideoVAEConfig.from_dict(config))


def build_audio_vae(config: dict[str, Any]) -> AudioVAE:
    return AudioVAE(AudioVAEConfig.from_dict(config))


def build_upsampler(config: dict[str, Any]) -> LTX2Upsampler:
    return LTX2Upsampler(LTX2UpsamplerConfig.from_dict(config))


BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "text_encoder": build_text_encoder,
    "connectors": build_connectors,
    "transformer": build_transformer,
    "vae": build_vae,
    "audio_vae": build_audio_vae,
    "vocoder": build_vocoder,
    "latent_upsampler": build_upsampler,
}
"""By component."""
