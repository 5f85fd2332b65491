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
from tests.pipelines.tiny_ltx2 import (
    CONFIGS,
    GEMMA,
    MAX_LENGTH,
    SCHEDULER,
    VISION,
    Version,
    randomised,
)


def reference_pipeline(version: Version, folder: Path, seed: int = 0) -> LTX2Pipeline:
    """Return diffusers' pipeline at fp32 on the CPU; `folder` gets the tokenizer it has."""
    vocab_size = write_tiny_gemma_tokenizer(folder, max_length=MAX_LENGTH)
    text = Gemma3Config(
        text_config={**GEMMA, "vocab_size": vocab_size},
        vision_config=VISION,
        mm_tokens_per_image=4,
    )
    configs = CONFIGS[version]
    vocoder = LTX2Vocoder if version == "2.0" else LTX2VocoderWithBWE
    torch.manual_seed(seed)
    pipe = LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=randomised(AutoencoderKLLTX2Video(**configs["vae"])),
        audio_vae=randomised(AutoencoderKLLTX2Audio(**configs["audio_vae"])),
        text_encoder=randomised(Gemma3ForConditionalGeneration(text)),
        tokenizer=GemmaTokenizer.from_pretrained(folder),
        connectors=randomised(LTX2TextConnectors(**configs["connectors"])),
        transformer=reference_transformer(version),
        vocoder=randomised(vocoder(**_without_class(configs["vocoder"]))),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reference_transformer(version: Version) -> LTX2VideoTransformer3DModel:
    """Return one more transformer of the version, of other weights each time."""
    return randomised(LTX2VideoTransformer3DModel(**CONFIGS[version]["transformer"]))


def reference_upsampler(version: Version) -> LTX2LatentUpsamplerModel:
    """Return the spatial x2 upsampler in the version's layout."""
    return randomised(LTX2LatentUpsamplerModel(**CONFIGS[version]["latent_upsampler"]))


def _without_class(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "_class_name"}
