"""request_id: equal for equal pixels, different for every field that changes them."""

import pickle
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from raydiff.request import RenderRequest, num_evaluations, row_guidance, with_request_id
from raydiff.video_settings import VideoSettings

REQUEST = RenderRequest(
    model="sdxl",
    model_revision="462165984030d82259a11f4367a4eed129e94a7b",
    task="img2img",
    prompt="a lighthouse at dusk, café ☕",
    negative_prompt="blurry",
    seed=7,
    height=768,
    width=1024,
    num_inference_steps=30,
    guidance_scale=7.5,
    guidance_rescale=0.0,
    sampler="euler",
    strength=0.5,
    init_image="/data/a.png",
    init_image_sha256="ab" * 32,
)

VIDEO = VideoSettings(
    video_mode="one_stage",
    text_encoder="gemma3",
    num_frames=121,
    frame_rate=24.0,
    stg_scale=1.0,
    stg_blocks=(29,),
    modality_scale=3.0,
    audio_guidance_scale=7.0,
    audio_stg_scale=1.0,
    audio_modality_scale=3.0,
    audio_guidance_rescale=0.7,
)
CHANGED_VIDEO = {
    "video_mode": "two_stage",
    "text_encoder": "random",
    "num_frames": 113,
    "frame_rate": 25.0,
    "stg_scale": 0.5,
    "stg_blocks": (28, 29),
    "modality_scale": 2.0,
    "audio_guidance_scale": 3.0,
    "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0,
    "audio_guidance_rescale": 0.0,
}
CHANGED = {
    "model": "other",
    "model_revision": "0" * 40,
    "task": "txt2img",
    "prompt": "a lighthouse at dusk, cafe ☕",
    "negative_prompt": None,
    "seed": 8,
    "height": 776,
    "width": 1016,
    "num_inference_steps": 31,
    "guidance_scale": 7.25,
    "guidance_rescale": 0.25,
    "sampler": "ddim",
    "strength": 0.75,
    "init_image_sha256": "cd" * 32,
    "video": VIDEO,
}


def identity(request: RenderRequest) -> str:
    return with_request_id(request).request_id


def test_the_identity_is_128_bits_in_hex_and_stays_what_it_was() -> None:
    # A change here re-renders every existing output folder: raise RECIPE_VERSION instead.
    assert identity(REQUEST) == "6f7f12d967b76bffc92090c5eaac997a"


@pytest.mark.parametrize("field", CHANGED)
def test_every_field_that_affects_pixels_changes_the_identity(field: str) -> None:
    assert identity(replace(REQUEST, **{field: CHANGED[field]})) != identity(REQUEST)


@pytest.mark.parametrize("field", CHANGED_VIDEO)
def test_every_setting_of_a_clip_changes_the_identity(field: str) -> None:
    changed = replace(VIDEO, **{field: CHANGED_VIDEO[field]})
    assert identity(replace(REQUEST, video=changed)) != identity(replace(REQUEST, video=VIDEO))


def test_a_clip_counts_its_passes_steps_and_stages() -> None:
    clip = replace(REQUEST, guidance_scale=3.0, num_inference_steps=40, video=VIDEO)
    assert row_guidance(clip).passes == ("negative", "positive", "perturbed", "isolated")
    assert num_evaluations(clip) == 160
    two = replace(clip, video=replace(VIDEO, video_mode="two_stage", stg_scale=0.0))
    assert num_evaluations(two) == 160 + 3  # the sound still has a pass without self attention
    plain = dict.fromkeys(("modality_scale", "audio_guidance_scale"), 1.0)
    sound = {"stg_scale": 0.0, "audio_stg_scale": 0.0, "audio_modality_scale": 1.0}
    bare = replace(clip, guidance_scale=1.0, video=replace(VIDEO, **plain, **sound))
    assert num_evaluations(bare) == 40
    with pytest.raises(ValueError, match="makes images"):
        num_evaluations(REQUEST)


def test_every_field_is_either_tested_here_or_left_out_on_purpose() -> None:
    assert set(CHANGED_VIDEO) == {field.name for field in fields(VideoSettings)}
    names = {field.name for field in fields(RenderRequest)}
    assert names - set(CHANGED) == {"init_image", "request_id"}


def test_an_empty_negative_prompt_is_not_an_absent_one() -> None:
    # SDXL's empty negative prompt is encoded, its absent one is zeros.
    empty, absent = (replace(REQUEST, negative_prompt=text) for text in ("", None))
    assert identity(empty) != identity(absent)


def test_where_things_lie_does_not_matter_where_a_hash_says_what_they_are() -> None:
    assert identity(replace(REQUEST, init_image="/elsewhere/b.png")) == identity(REQUEST)
    local = replace(REQUEST, model="/a/sdxl", model_revision="local-123")
    assert identity(local) == identity(replace(local, model="/b/sdxl"))


def test_a_set_identity_does_not_feed_into_itself() -> None:
    once = with_request_id(REQUEST)
    assert with_request_id(once) == once
    assert replace(once, request_id="") == REQUEST


def test_equal_numbers_are_equal_requests() -> None:
    whole = replace(REQUEST, guidance_scale=7, strength=1, guidance_rescale=0)
    real = replace(REQUEST, guidance_scale=7.0, strength=1.0, guidance_rescale=-0.0)
    assert identity(whole) == identity(real)


def test_equal_settings_are_equal_clips() -> None:
    floats = {field.name for field in fields(VideoSettings) if field.type is float}
    assert len(floats) == 7
    real = replace(VIDEO, **dict.fromkeys(floats, 7.0), stg_blocks=(28, 29))
    whole = replace(VIDEO, **dict.fromkeys(floats, 7), stg_blocks=(29, 28, 29))
    assert identity(replace(REQUEST, video=whole)) == identity(replace(REQUEST, video=real))
    none, minus = (replace(VIDEO, **dict.fromkeys(floats, zero)) for zero in (0, -0.0))
    assert identity(replace(REQUEST, video=none)) == identity(replace(REQUEST, video=minus))


@pytest.mark.parametrize("prompt", ["", "\0", "a\nb", "../../etc/passwd", "\ud800", "x" * 100_000])
def test_any_text_is_a_prompt(prompt: str) -> None:
    assert len(identity(replace(REQUEST, prompt=prompt))) == 32


def test_requests_are_frozen_and_picklable() -> None:
    with pytest.raises(FrozenInstanceError):
        REQUEST.seed = 3  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(REQUEST)) == REQUEST
