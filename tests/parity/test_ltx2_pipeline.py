"""LTX-2's whole pipeline against diffusers' on random weights: prompts to frames and sound."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.ltx2.utils import DISTILLED_SIGMA_VALUES, apply_image_conditioning_crf
from torch import Tensor, nn

from raydiff.memory.residency import Residency
from raydiff.pipelines.ltx2.decoder import ClipDecoder
from raydiff.pipelines.ltx2.first_frame import compress
from raydiff.pipelines.ltx2.pipeline import LTX2Pipeline as OurPipeline
from raydiff.video_settings import VideoMode
from raydiff.weights.published_ltx2 import LTX2Version
from tests.parity.ltx2_reference import GUIDED, UNGUIDED, Reference, read_image, write_image
from tests.pipelines.tiny_ltx2 import (
    clip_request,
    tiny_components,
    tiny_pipeline,
    two_stage_modules,
)

TOLERANCE = 1e-4

pytestmark = pytest.mark.filterwarnings("ignore:Accessing config attribute `hop_length`")

SIZE: dict[str, Any] = {"height": 64, "width": 96, "num_frames": 9, "frame_rate": 25.0}
TWICE = {**SIZE, "height": 128, "width": 192}
ROWS: list[dict[str, Any]] = [
    {
        "prompt": " a red cat on the video ",
        "negative_prompt": "blue",
        "seed": 1,
        "num_inference_steps": 3,
        "stg_blocks": (1,),
        **GUIDED,
    },
    {
        "prompt": "dog",
        "negative_prompt": None,
        "seed": 2,
        "num_inference_steps": 4,
        "stg_blocks": (0, 2),
        **UNGUIDED,
        "audio_guidance_scale": 4.0,
        "modality_scale": 2.0,
    },
    {
        "prompt": "the camera",
        "negative_prompt": None,
        "seed": 3,
        "num_inference_steps": 2,
        "stg_blocks": (),
        **UNGUIDED,
    },
]
"""Rows with all, some and no guidance, of different lengths; they share a batch."""


class Pair(Reference):
    """diffusers' pipelines of one version, and ours on the same weights."""

    def __init__(self, version: LTX2Version, folder: Path) -> None:
        super().__init__(version, folder)
        references: dict[str, nn.Module] = {
            **self.pipe.components,
            "text_encoder": self.pipe.text_encoder.model.language_model,
            "latent_upsampler": self.upsampler,
            "refine_transformer": self.refine_transformer,
        }
        modules = two_stage_modules(version, self.pipe.text_encoder.config.text_config.vocab_size)
        for name, module in modules.items():
            module.load_state_dict(references[name].state_dict())
        self.parts = tiny_components(version, folder, modules)
        self.decoder = ClipDecoder(
            self.parts.vae,
            self.parts.audio_vae,
            self.parts.vocoder,
            Residency(modules, tiny_pipeline(self.parts).profile),
        )

    def render(
        self,
        pipeline: OurPipeline,
        rows: Sequence[dict[str, Any]],
        mode: VideoMode = "one_stage",
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return what we make of a batch: frames in 0..1 before they are rounded, and sound."""
        requests = [clip_request(pipeline, mode=mode, **row) for row in rows]
        denoised = pipeline.denoise_rows(requests, pipeline.encode(requests))
        assert denoised.errors == (None,) * len(rows)
        return [
            (as_levels(self.decoder.pixels(video, pipeline.profile)), self.decoder.sound(audio))
            for video, audio in denoised.latents
        ]


def as_levels(parts: Iterable[Tensor]) -> np.ndarray:
    """Return parts (f, 3, H, W) in -1..1 as frames (F, H, W, 3) in 0..1."""
    frames = torch.cat(list(parts)).permute(0, 2, 3, 1)
    return (frames / 2 + 0.5).clamp(0, 1).numpy()


def assert_equal(ours: tuple[np.ndarray, np.ndarray], frames: np.ndarray, sound: Tensor) -> None:
    assert ours[0].shape == frames[0].shape
    assert ours[1].shape == tuple(sound[0].shape)
    assert np.abs(ours[0] - frames[0]).max() <= TOLERANCE
    assert np.abs(ours[1] - sound[0].numpy()).max() <= TOLERANCE
    # Neither grey nor silent, and not cut at the ends of their ranges.
    assert frames[0].std() > 0.1
    assert 0.02 < sound[0].std() < 0.7


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def init_image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the path of an image of the clips' aspect and of another, odd, size."""
    return write_image(tmp_path_factory.mktemp("images") / "first.png", 97, 145)


def test_one_stage_equals_diffusers_in_a_batch_of_mixed_guidance_and_steps(pair: Pair) -> None:
    rows = [{**row, **SIZE} for row in ROWS]
    for guidance in ("batched", "sequential"):
        pipeline = tiny_pipeline(pair.parts, guidance=guidance)
        clips = pair.render(pipeline, rows)
        for row, clip in zip(rows, clips, strict=True):
            assert_equal(clip, *pair.reference(row))


def test_a_given_first_frame_equals_diffusers_beside_rows_without(
    pair: Pair, init_image: str
) -> None:
    first, second, third = ({**row, **SIZE} for row in ROWS)
    rows = [{**first, "init_image": init_image}, second, {**third, "init_image": init_image}]
    clips = pair.render(tiny_pipeline(pair.parts), rows)
    for row, clip in zip(rows, clips, strict=True):
        assert_equal(clip, *pair.reference(row))


def test_distilled_equals_diffusers(pair: Pair) -> None:
    row = {**ROWS[2], **SIZE, "num_inference_steps": 8}
    scheduler = pair.fixed_scheduler()
    expected = pair.reference(row, scheduler, sigmas=DISTILLED_SIGMA_VALUES)
    (clip,) = pair.render(tiny_pipeline(pair.parts), [row], "distilled")
    assert_equal(clip, *expected)


@pytest.mark.parametrize("task", ["txt2vid", "img2vid"])
def test_two_stages_equal_diffusers(pair: Pair, init_image: str, task: str) -> None:
    row = {**ROWS[0], **TWICE} | ({"init_image": init_image} if task == "img2vid" else {})
    frames, first_sound, _ = pair.reference_in_two_stages(row, pair.refine_transformer)
    (clip,) = pair.render(tiny_pipeline(pair.parts), [row], "two_stage")
    assert_equal(clip, frames, first_sound)


def test_distilled_two_stages_equal_diffusers(pair: Pair) -> None:
    row = {**ROWS[2], **TWICE, "num_inference_steps": 8}
    scheduler = pair.fixed_scheduler()
    frames, _, second_sound = pair.reference_in_two_stages(
        row, pair.pipe.transformer, scheduler=scheduler, sigmas=DISTILLED_SIGMA_VALUES
    )
    parts = replace(pair.parts, refine_transformer=None)
    (clip,) = pair.render(tiny_pipeline(parts), [row], "distilled_two_stage")
    assert_equal(clip, frames, second_sound)


@pytest.mark.parametrize("size", [(64, 96), (97, 145)])
def test_a_first_frame_is_compressed_as_diffusers_does(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    path = write_image(tmp_path / "first.png", *size)
    pixels = np.array(read_image(path))
    expected = apply_image_conditioning_crf(pixels, 33)
    assert np.array_equal(compress(pixels, 33), expected)
    height, width = expected.shape[:2]
    assert np.abs(expected - pixels[:height, :width].astype(float)).mean() > 0.5
