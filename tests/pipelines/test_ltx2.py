"""LTX-2's pipeline: its rules one by one, stages apart, mixed batches, memory policies, errors."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raydiff.diffusion.flow_match import FlowMatchConfig
from raydiff.errors import ConfigError, RowError
from raydiff.memory.residency import Residency
from raydiff.models.ltx2.transformer import LTX2Transformer
from raydiff.models.ltx2.transformer_config import LTX2TransformerConfig
from raydiff.pipelines.base import Denoised
from raydiff.pipelines.ltx2.components import ClipLatents, LTX2Components, pack
from raydiff.pipelines.ltx2.decoder import ClipDecoder
from raydiff.pipelines.ltx2.first_frame import fit_first_frame, read_first_frame
from raydiff.pipelines.ltx2.pipeline import LTX2Pipeline
from raydiff.pipelines.tiny_ltx2 import CONFIGS
from raydiff.request import RenderRequest, batch_key, num_evaluations, row_guidance
from raydiff.video_settings import VideoMode
from raydiff.weights.published_ltx2 import SCHEDULER
from tests.pipelines.tiny_ltx2 import clip_request, tiny_components, tiny_pipeline
from tests.relative_error import relative_error

SIZE: dict[str, Any] = {"height": 64, "width": 96, "num_frames": 9, "frame_rate": 25.0}
TWICE = {**SIZE, "height": 128, "width": 192}
UNGUIDED: dict[str, Any] = {
    "guidance_scale": 1.0,
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_guidance_scale": 1.0,
    "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0,
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> LTX2Components:
    return tiny_components("2.0", tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def init_image(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("images") / "first.png"
    coarse = np.random.default_rng(5).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((192, 128), Image.Resampling.BICUBIC).save(path)
    return str(path)


def request(pipeline: LTX2Pipeline, mode: VideoMode = "one_stage", **values: Any) -> RenderRequest:
    """Return a small clip's request, guided as the checkpoint's own pipeline does."""
    return clip_request(pipeline, mode=mode, **{"prompt": "a red cat", "seed": 1, **SIZE, **values})


def denoise(pipeline: LTX2Pipeline, *requests: RenderRequest) -> Denoised:
    return pipeline.denoise_rows(requests, pipeline.encode(requests))


def denoise_one(pipeline: LTX2Pipeline, one: RenderRequest) -> ClipLatents:
    """Return the latents of the only row."""
    (latents,) = denoise(pipeline, one).latents
    return latents


# The rules of sampling.


def test_clips_have_8k_plus_1_frames_and_25_sound_latents_a_second(parts: LTX2Components) -> None:
    pipeline = tiny_pipeline(parts)
    for num_frames, frame_rate, num_latents in (
        (1, 25.0, 1),
        (17, 24000 / 1001, 18),
        (9, 10.0, 22),
    ):
        one = request(pipeline, num_frames=num_frames, frame_rate=frame_rate, **UNGUIDED)
        one = replace(one, num_inference_steps=1)
        latents = denoise_one(pipeline, one)
        assert latents.video.shape == (16, (num_frames - 1) // 8 + 1, 2, 3)
        assert latents.audio.shape == (num_latents, 16)
        clips = pipeline.decode_rows([latents])
        assert clips.pixels[0].shape == (num_frames, 64, 96, 3)
        assert clips.audio is not None
        sound = clips.audio[0]
        assert sound is not None
        # 4 T - 3 mel frames of 10 ms each.
        assert sound.samples.shape == (2, (4 * num_latents - 3) * sound.sample_rate // 100)
        assert sound.samples.dtype == np.float32


def test_tiles_and_chunks_give_about_the_whole_clip(parts: LTX2Components) -> None:
    """In chunks of 8 frames it is the same clip; tiles show at their seams alone."""
    latents = torch.randn((16, 3, 2, 18), generator=torch.Generator().manual_seed(1))

    def frames(**changes: Any) -> list[np.ndarray]:
        profile = tiny_pipeline(parts, **changes).profile
        residency = Residency(parts.modules, profile)
        decoder = ClipDecoder(parts.vae, parts.audio_vae, parts.vocoder, residency)
        return [part.astype(int) for part in decoder.frames(latents, profile)]

    (whole,) = frames()
    chunks = frames(vae_batch_pixels=64 * 576)
    assert len(chunks) > 1
    assert np.abs(np.concatenate(chunks) - whole).max() <= 1
    tiles = np.concatenate(frames(vae_tile_pixels=64 * 512))
    assert tiles.shape == whole.shape == (17, 64, 576, 3)
    difference = np.abs(tiles - whole)
    seam = difference[:, :, 128:448]  # The overlap is 256 to 320; convolutions reach further.
    assert np.delete(difference, np.s_[128:448], axis=2).max() <= 1
    assert 0 < seam.mean() < 10


def test_the_schedule_is_shifted_by_the_tokens_of_the_clip(parts: LTX2Components) -> None:
    config = FlowMatchConfig.from_dict(SCHEDULER)

    def latents(schedule: FlowMatchConfig) -> torch.Tensor:
        pipeline = tiny_pipeline(replace(parts, schedule=schedule))
        one = request(pipeline, num_inference_steps=3, **UNGUIDED)
        return denoise_one(pipeline, one).video

    def fixed(num_tokens: int) -> FlowMatchConfig:
        return FlowMatchConfig(shift=math.exp(config.mu(num_tokens)), shift_terminal=0.1)

    assert relative_error(latents(fixed(2 * 2 * 3)), latents(config)) <= 1e-4
    assert relative_error(latents(fixed(4096)), latents(config)) > 1e-2


def test_stg_leaves_out_self_attention_whatever_the_config_says(parts: LTX2Components) -> None:
    config = {**CONFIGS["2.0"]["transformer"], "perturbed_attn": False}
    transformer = LTX2Transformer(LTX2TransformerConfig.from_dict(config)).requires_grad_(False)
    assert parts.transformer is not None
    transformer.load_state_dict(parts.transformer.state_dict())
    pipelines = [tiny_pipeline(parts), tiny_pipeline(replace(parts, transformer=transformer))]
    values = {**UNGUIDED, "num_inference_steps": 2, "stg_scale": 1.0, "stg_blocks": (0, 2)}
    with_stg, same = (denoise_one(one, request(one, **values)).video for one in pipelines)
    without = denoise_one(pipelines[0], request(pipelines[0], **{**values, "stg_scale": 0.0}))
    other_block = denoise_one(pipelines[0], request(pipelines[0], **{**values, "stg_blocks": (1,)}))
    assert torch.equal(with_stg, same)
    assert relative_error(with_stg, without.video) > 1e-2
    assert relative_error(with_stg, other_block.video) > 1e-2


def test_distilled_runs_8_steps_and_3_in_a_second_stage(parts: LTX2Components) -> None:
    parts = replace(parts, refine_transformer=None)
    pipeline = tiny_pipeline(parts)
    modes: dict[VideoMode, int] = {"distilled": 8, "distilled_two_stage": 11}
    for mode, nfe in modes.items():
        one = request(pipeline, mode, **TWICE)
        assert row_guidance(one).passes == ("positive",)
        assert count_rows(parts, lambda one=one: denoise(pipeline, one)) == [1] * nfe
        assert num_evaluations(one) == nfe


def test_two_stages_keep_the_first_sound_unless_distilled(parts: LTX2Components) -> None:
    pipeline = tiny_pipeline(parts)

    def sound(mode: VideoMode, **values: Any) -> torch.Tensor:
        return denoise_one(pipeline, request(pipeline, mode, **values)).audio

    values = {**UNGUIDED, "num_inference_steps": 3}
    assert torch.equal(sound("two_stage", **{**values, **TWICE}), sound("one_stage", **values))
    assert relative_error(sound("distilled_two_stage", **TWICE), sound("distilled")) > 0.1


@pytest.mark.parametrize("mode", ["one_stage", "two_stage"])
def test_a_given_first_frame_stays_clean_at_the_size_of_the_clip(
    parts: LTX2Components, init_image: str, mode: VideoMode
) -> None:
    pipeline, vae = tiny_pipeline(parts), parts.vae
    assert vae is not None
    given = request(pipeline, mode, init_image=init_image, num_inference_steps=3, **TWICE)
    free = request(pipeline, mode, num_inference_steps=3, **TWICE)
    with_frame, without = (row.video for row in denoise(pipeline, given, free).latents)
    pixels = fit_first_frame(read_first_frame(init_image), 128, 192)
    expected = vae.normalize(vae.encode(pixels).mean)[0]
    torch.testing.assert_close(with_frame[:, :1], expected, rtol=1e-5, atol=1e-5)
    assert relative_error(without[:, :1], expected) > 0.1
    assert relative_error(with_frame[:, 1:], without[:, 1:]) > 1e-3


def test_latents_are_float32_between_the_steps_of_a_bfloat16_model(parts: LTX2Components) -> None:
    config = LTX2TransformerConfig.from_dict(CONFIGS["2.0"]["transformer"])
    assert parts.transformer is not None
    transformer = LTX2Transformer(config).requires_grad_(False)
    transformer.load_state_dict(parts.transformer.state_dict())
    whole, half = (
        tiny_pipeline(replace(parts, transformer=model))
        for model in (parts.transformer, transformer.bfloat16())
    )
    values = {**UNGUIDED, "num_inference_steps": 4}
    expected = denoise_one(whole, request(whole, **values)).video
    latents = denoise_one(half, request(half, **values)).video
    assert latents.dtype == torch.float32
    assert not torch.equal(latents, latents.bfloat16().float())
    assert relative_error(latents, expected) < 0.05


# Batches.


def test_rows_of_a_mixed_batch_get_what_they_get_alone_and_run_no_pass_too_many(
    parts: LTX2Components, init_image: str
) -> None:
    pipeline = tiny_pipeline(parts)
    rows = [
        request(pipeline, num_inference_steps=2),
        request(pipeline, seed=2, num_inference_steps=3, init_image=init_image, **UNGUIDED),
        request(pipeline, seed=3, num_inference_steps=1, **{**UNGUIDED, "guidance_scale": 4.0}),
    ]
    assert count_rows(parts, lambda: denoise(pipeline, *rows)) == [4 + 1 + 2, 4 + 1, 1]
    assert [num_evaluations(one) for one in rows] == [8, 3, 2]
    for one, together in zip(rows, denoise(pipeline, *rows).latents, strict=True):
        alone = denoise_one(pipeline, one)
        assert relative_error(together.video, alone.video) <= 1e-5
        assert relative_error(together.audio, alone.audio) <= 1e-5


def test_stages_apart_give_what_they_give_together(parts: LTX2Components) -> None:
    """Texts are encoded where there is no transformer, and go as features, not as embeddings."""
    none = dict.fromkeys(("transformer", "refine_transformer", "latent_upsampler"))
    encoder = tiny_pipeline(replace(parts, **none))
    renderer = tiny_pipeline(replace(parts, text_encoder=None, tokenizer=None))
    whole = tiny_pipeline(parts)
    one = request(whole, num_inference_steps=1, negative_prompt="blue")
    texts = ["a red cat", "blue"]
    encoded = dict(zip(texts, encoder.encode_texts(texts), strict=True))
    assert encoded["blue"].embeds.shape[0] < encoded["a red cat"].embeds.shape[0] < 32
    (apart,) = renderer.denoise_rows([one], renderer.gather([one], encoded)).latents
    assert torch.equal(apart.video, denoise_one(whole, one).video)
    with pytest.raises(RowError, match='the embeddings of "blue" did not come with its row'):
        renderer.gather([one], {"a red cat": encoded["a red cat"]})
    with pytest.raises(ConfigError, match="encode: this pipeline has only transformer"):
        renderer.encode([one])
    with pytest.raises(ConfigError, match="denoise: this pipeline has only text_encoder"):
        denoise(encoder, one)


def test_a_prompt_that_is_cut_is_said_so(parts: LTX2Components) -> None:
    pipeline = tiny_pipeline(parts)
    long = request(pipeline, prompt="a " * 60, negative_prompt="b " * 60)
    short = request(pipeline)
    warnings = pipeline.encode([long, short]).warnings
    assert warnings == ("prompt and negative_prompt cut to 32 tokens", None)


def test_a_row_that_is_not_finite_costs_the_others_nothing(parts: LTX2Components) -> None:
    pipeline = tiny_pipeline(parts)
    bad = request(pipeline, num_inference_steps=2, guidance_scale=1e38, guidance_rescale=0.0)
    good = request(pipeline, num_inference_steps=2, **UNGUIDED)
    clips = pipeline.render([bad, good])
    assert clips.errors[0] is not None
    assert "NaN in latents after step" in clips.errors[0]
    assert clips.pixels[0].shape == (0, 64, 96, 3)
    assert clips.audio[0] is None
    assert clips.errors[1] is None
    assert clips.pixels[1].shape == (9, 64, 96, 3)
    assert clips.audio[1] is not None


def test_frames_that_are_not_finite_are_an_error_that_says_where(parts: LTX2Components) -> None:
    latents = torch.zeros(16, 2, 2, 3)
    latents[..., 0, 0] = math.nan
    clips = tiny_pipeline(parts).decode_rows([ClipLatents(latents, torch.zeros(2, 16))])
    assert clips.errors[0] is not None
    assert "the VAE made NaN or infinity of good latents, from frame 0" in clips.errors[0]
    assert clips.audio == [None]


def test_a_batch_has_one_shape(parts: LTX2Components) -> None:
    pipeline = tiny_pipeline(parts)
    rows = [request(pipeline), request(pipeline, frame_rate=12.0)]
    assert batch_key(rows[0]) != batch_key(rows[1])
    with pytest.raises(ValueError, match="a batch has one shape"):
        denoise(pipeline, *rows)
    modes: tuple[VideoMode, ...] = ("one_stage", "two_stage")
    with pytest.raises(ValueError, match="a batch has one shape"):
        denoise(pipeline, *(request(pipeline, mode, **TWICE) for mode in modes))


def test_two_stages_need_an_upsampler(parts: LTX2Components) -> None:
    two_stages = request(tiny_pipeline(parts), "two_stage", num_inference_steps=1, **TWICE)
    pipeline = tiny_pipeline(replace(parts, latent_upsampler=None))
    with pytest.raises(ConfigError, match="denoise: this pipeline has only transformer, "):
        denoise(pipeline, two_stages)


def test_an_image_of_another_aspect_is_cropped_not_stretched(tmp_path: Path) -> None:
    pixels = np.zeros((64, 192, 3), np.uint8)
    pixels[:, 64:128] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image = read_first_frame(str(tmp_path / "wide.png"), crf=0)
    frame = fit_first_frame(image, 64, 64)
    assert frame.shape == (1, 3, 1, 64, 64)
    assert torch.equal(frame, torch.ones_like(frame))
    assert pack(frame).shape == (1, 64 * 64, 3)


def count_rows(parts: LTX2Components, run: Any) -> list[int]:
    """Return how many rows each forward pass of either transformer has while `run` runs."""
    rows: list[int] = []
    models = [model for model in (parts.transformer, parts.refine_transformer) if model is not None]
    hooks = [
        model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        for model in models
    ]
    run()
    for hook in hooks:
        hook.remove()
    return rows
