"""A trained mini-ltx2 as a Hugging Face pipeline folder: half-precision safetensors and configs."""

from pathlib import Path

from torch import nn

from raydiff.gemma_tokenizer import GemmaTokenizer, write_tiny_gemma_tokenizer
from raydiff.mini.ltx2.captions import clip_words
from raydiff.mini.ltx2.recipe import (
    AUDIO_VAE,
    CONNECTORS,
    GEMMA,
    MAX_TOKENS,
    TRANSFORMER,
    VIDEO_VAE,
    VOCODER,
)
from raydiff.mini.ltx2.train_denoiser import ClipDenoiser
from raydiff.mini.save import half
from raydiff.models.ltx2.audio_vae import AudioVAE
from raydiff.models.ltx2.video_vae import LTX2VideoVAE
from raydiff.models.ltx2.vocoder import Vocoder
from raydiff.pipelines.save_ltx2 import gemma_config, save_ltx2


def save_clip_tokenizer(folder: Path) -> GemmaTokenizer:
    """Write the tokenizer below a pipeline's folder, and return it."""
    write_tiny_gemma_tokenizer(folder / "tokenizer", clip_words(), max_length=MAX_TOKENS)
    return GemmaTokenizer.from_folder(folder / "tokenizer")


def save_clip_miniature(
    folder: Path,
    *,
    vae: LTX2VideoVAE,
    audio_vae: AudioVAE,
    vocoder: Vocoder,
    denoiser: ClipDenoiser,
) -> None:
    """Write everything but the tokenizer, which training needed before."""
    modules: dict[str, nn.Module] = {
        "text_encoder": denoiser.text_encoder,
        "connectors": denoiser.connectors,
        "transformer": denoiser.transformer,
        "vae": vae,
        "audio_vae": audio_vae,
        "vocoder": vocoder,
    }
    configs = {
        "text_encoder": gemma_config(GEMMA, denoiser.text_encoder.config.vocab_size),
        "connectors": CONNECTORS,
        "transformer": TRANSFORMER,
        "vae": VIDEO_VAE,
        "audio_vae": AUDIO_VAE,
        "vocoder": VOCODER,
    }
    save_ltx2(folder, configs, {name: half(module) for name, module in modules.items()})
