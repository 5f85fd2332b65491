"""A tiny LTX-2 of random weights as diffusers builds and saves it: the reference to be equal to."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder, LTX2VocoderWithBWE
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GemmaTokenizer

from raydiff.gemma_tokenizer import write_tiny_gemma_tokenizer
from raydiff.pipelines.tiny_ltx2 import CONFIGS, GEMMA, SCHEDULER, LTX2Version
from tests.pipelines.tiny_ltx2 import MAX_LENGTH, VISION, randomised


def reference_pipeline(version: LTX2Version, folder: Path, seed: int = 0) -> LTX2Pipeline:
    """Return diffusers' pipeline at fp32 on the CPU; `folder` gets the tokenizer it has."""
    vocab_size = write_tiny_gemma_tokenizer(folder, max_length=MAX_LENGTH)
    text = Gemma3Config(
        text_config={**GEMMA, "vocab_size": vocab_size},
        vision_config=VISION,
        mm_tokens_per_image=4,
    )
    configs = _configs(version)
    vocoder = LTX2Vocoder if version == "2.0" else LTX2VocoderWithBWE
    torch.manual_seed(seed)
    pipe = LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER),
        vae=randomised(AutoencoderKLLTX2Video(**configs["vae"])),
        audio_vae=randomised(AutoencoderKLLTX2Audio(**configs["audio_vae"])),
        text_encoder=randomised(Gemma3ForConditionalGeneration(text)),
        tokenizer=GemmaTokenizer.from_pretrained(folder),
        connectors=randomised(LTX2TextConnectors(**configs["connectors"])),
        transformer=reference_transformer(version),
        vocoder=randomised(vocoder(**configs["vocoder"])),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reference_transformer(version: LTX2Version) -> LTX2VideoTransformer3DModel:
    """Return one more transformer of the version, of other weights each time."""
    return randomised(LTX2VideoTransformer3DModel(**_configs(version)["transformer"]))


def reference_upsampler(version: LTX2Version) -> LTX2LatentUpsamplerModel:
    """Return the spatial x2 upsampler in the version's layout."""
    return randomised(LTX2LatentUpsamplerModel(**_configs(version)["latent_upsampler"]))


def _configs(version: LTX2Version) -> dict[str, dict[str, Any]]:
    return {
        component: {name: value for name, value in config.items() if name != "_class_name"}
        for component, config in CONFIGS[version].items()
    }
