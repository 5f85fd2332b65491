"""A tiny LTX-2 of random weights as diffusers builds and saves it: the reference to be equal to."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2ImageToVideoPipeline,
    LTX2LatentUpsamplePipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder, LTX2VocoderWithBWE
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from diffusers.pipelines.ltx2.utils import (
    STAGE_2_DISTILLED_SIGMA_VALUES,
    apply_image_conditioning_crf,
)
from PIL import Image
from torch import Tensor, nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GemmaTokenizer

from raydiff.gemma_tokenizer import write_tiny_gemma_tokenizer
from raydiff.pipelines.tiny_ltx2 import CONFIGS, GEMMA
from raydiff.weights.published_ltx2 import SCHEDULER, LTX2Version
from tests.pipelines.tiny_ltx2 import MAX_LENGTH, VISION, randomised

UNGUIDED: dict[str, Any] = {
    "guidance_scale": 1.0,
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "guidance_rescale": 0.0,
    "audio_guidance_scale": 1.0,
    "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0,
    "audio_guidance_rescale": 0.0,
}
GUIDED: dict[str, Any] = {
    "guidance_scale": 3.0,
    "stg_scale": 1.0,
    "modality_scale": 2.5,
    "guidance_rescale": 0.7,
    "audio_guidance_scale": 5.0,
    "audio_stg_scale": 0.8,
    "audio_modality_scale": 2.0,
    "audio_guidance_rescale": 0.4,
}


class Reference:
    """diffusers' pipelines of one version, and what they make of rows of a manifest."""

    def __init__(self, version: LTX2Version, folder: Path) -> None:
        self.pipe = reference_pipeline(version, folder)
        self.upsampler = reference_upsampler(version)
        self.refine_transformer = reference_transformer(version)

    def save(self, folder: Path) -> None:
        """Write what diffusers writes, and the second stage's models where we look for them."""
        self.pipe.save_pretrained(folder)
        self.upsampler.save_pretrained(folder / "latent_upsampler")
        self.refine_transformer.save_pretrained(folder / "refine_transformer")

    def reference(
        self, row: dict[str, Any], scheduler: Any = None, **options: Any
    ) -> tuple[Any, Any]:
        """Return what diffusers makes of one row: frames and sound, or latents."""
        components = self.pipe.components
        if scheduler is not None:
            components = components | {"scheduler": scheduler}
        return self.call(row, components, as_arguments(row) | options)

    def call(
        self, row: dict[str, Any], components: dict[str, Any], arguments: dict[str, Any]
    ) -> tuple[Any, Any]:
        """Call diffusers' pipeline for the row's task."""
        pipe = (LTX2ImageToVideoPipeline if "init_image" in row else LTX2Pipeline)(**components)
        pipe.set_progress_bar_config(disable=True)
        frames, sound = pipe(**arguments, return_dict=False, max_sequence_length=MAX_LENGTH)
        return frames, sound

    def reference_in_two_stages(
        self, row: dict[str, Any], transformer: nn.Module, **options: Any
    ) -> tuple[np.ndarray, Tensor, Tensor]:
        """Return diffusers' frames and the sounds of its two stages, called as its docs do.

        They have no first frame in the second stage but the upsampler's; LTX-2's own pipelines
        encode the image once more, at the whole size.
        """
        half = {**row, "height": row["height"] // 2, "width": row["width"] // 2}
        generator = torch.Generator().manual_seed(row["seed"])
        shared = {"generator": generator, **options}
        video, audio = self.reference(half, **shared, output_type="latent")
        upsample = LTX2LatentUpsamplePipeline(vae=self.pipe.vae, latent_upsampler=self.upsampler)
        sizes = {"height": half["height"], "width": half["width"], "num_frames": row["num_frames"]}
        (latents,) = upsample(latents=video, **sizes, output_type="latent", return_dict=False)
        if "init_image" in row:
            latents[:, :, :1] = self.first_frame(row)
        changes = {"transformer": transformer, "scheduler": self.fixed_scheduler()}
        refine = self.pipe.components | changes
        arguments = as_arguments(row | UNGUIDED | {"num_inference_steps": 3}) | {
            "generator": generator,
            "latents": latents,
            "audio_latents": audio,
            "sigmas": STAGE_2_DISTILLED_SIGMA_VALUES,
            "noise_scale": STAGE_2_DISTILLED_SIGMA_VALUES[0],
        }
        frames, second_sound = self.call(row, refine, arguments)
        with torch.no_grad():
            first_sound = self.pipe.vocoder(self.pipe.audio_vae.decode(audio).sample)
        return frames, first_sound, second_sound

    def fixed_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """Return the scheduler that takes lists of sigmas as they are."""
        return FlowMatchEulerDiscreteScheduler.from_config(
            self.pipe.scheduler.config, use_dynamic_shifting=False, shift_terminal=None
        )

    @torch.no_grad()
    def first_frame(self, row: dict[str, Any]) -> Tensor:
        """Return the raw latents of the row's image at its whole size."""
        pipe = LTX2ImageToVideoPipeline(**self.pipe.components)
        pixels = apply_image_conditioning_crf(np.array(read_image(row["init_image"])), 33)
        image = pipe.video_processor.preprocess(
            Image.fromarray(pixels), height=row["height"], width=row["width"]
        )
        return self.pipe.vae.encode(image.unsqueeze(2)).latent_dist.mode()


def as_arguments(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as diffusers' pipelines take it."""
    values = {"output_type": "np", "generator": torch.Generator().manual_seed(row["seed"]), **row}
    del values["seed"]
    values["spatio_temporal_guidance_blocks"] = list(values.pop("stg_blocks")) or None
    if "init_image" in values:
        values["image"] = read_image(values.pop("init_image"))
    return values


def read_image(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def write_image(path: Path, height: int, width: int) -> str:
    """Write smooth random colours, which H.264 changes and does not destroy."""
    coarse = np.random.default_rng(5).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return str(path)


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
