"""Clips through read_rows: the official defaults, what a row may ask for, what its error says."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raydiff.config import DefaultsConfig, load_config
from raydiff.errors import ConfigError, ModelError
from raydiff.manifest.reader import open_manifest
from raydiff.manifest.rows import read_rows
from raydiff.manifest.schema import COLUMNS
from raydiff.request import ManifestRow, ModelInfo, RenderRequest, num_evaluations, row_guidance
from raydiff.video_settings import VideoSettings
from tests.manifest.known_models import LTX2, SDXL, without_upsampler

LTX23 = replace(
    LTX2,
    name="ltx2.3",
    default_num_inference_steps=30,
    video=replace(LTX2.video, default_stg_block=28) if LTX2.video else None,
)
BARE = without_upsampler(LTX2, name="bare")
MODELS = {info.name: info for info in (LTX2, LTX23, SDXL, BARE)}
CLIP_COLUMNS: dict[str, Any] = {
    "num_frames": 121,
    "frame_rate": 24.0,
    "stg_scale": 1.0,
    "stg_blocks": [28, 29],
    "modality_scale": 3.0,
    "audio_guidance_scale": 7.0,
    "audio_stg_scale": 1.0,
    "audio_modality_scale": 3.0,
    "audio_guidance_rescale": 0.7,
}

Rows = Callable[..., list[ManifestRow]]


def models(name: str) -> ModelInfo:
    try:
        return MODELS[name]
    except KeyError:
        raise ModelError(f'"{name}" is no model.') from None


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    """Read rows of columns given in place; keywords with __ are the run's config."""

    def read(columns: dict[str, Any], **overrides: Any) -> list[ManifestRow]:
        pq.write_table(pa.table(columns), tmp_path / "m.parquet")
        values = {"model.name": "ltx2"} | {k.replace("__", "."): v for k, v in overrides.items()}
        manifest = open_manifest(tmp_path / "m.parquet")
        return list(read_rows(manifest, config=load_config(overrides=values), models=models))

    return read


def request_of(row: ManifestRow) -> RenderRequest:
    assert row.error is None
    assert row.request is not None
    return row.request


def video_of(row: ManifestRow) -> VideoSettings:
    video = request_of(row).video
    assert video is not None
    return video


@pytest.mark.parametrize(("name", "steps", "block"), [("ltx2", 40, 29), ("ltx2.3", 30, 28)])
def test_a_prompt_alone_takes_the_official_defaults(
    rows: Rows, name: str, steps: int, block: int
) -> None:
    request = request_of(rows({"prompt": ["a red fox"]}, model__name=name)[0])
    assert (request.task, request.sampler, request.strength) == ("txt2vid", "euler", None)
    assert (request.height, request.width, request.num_inference_steps) == (512, 768, steps)
    assert (request.guidance_scale, request.guidance_rescale) == (3.0, 0.7)
    assert request.video == VideoSettings(
        video_mode="one_stage",
        text_encoder="gemma3",
        num_frames=121,
        frame_rate=24.0,
        stg_scale=1.0,
        stg_blocks=(block,),
        modality_scale=3.0,
        audio_guidance_scale=7.0,
        audio_stg_scale=1.0,
        audio_modality_scale=3.0,
        audio_guidance_rescale=0.7,
    )
    assert num_evaluations(request) == 4 * steps


@pytest.mark.parametrize(("mode", "evaluations"), [("distilled", 8), ("distilled_two_stage", 11)])
def test_a_distilled_clip_has_8_steps_and_no_guidance(
    rows: Rows, mode: str, evaluations: int
) -> None:
    (row,) = rows({"prompt": ["a"]}, ltx2__mode=mode, ltx2__text_encoder="random")
    request = request_of(row)
    assert request.num_inference_steps == 8
    assert row_guidance(request).passes == ("positive",)
    assert num_evaluations(request) == evaluations
    assert (video_of(row).video_mode, video_of(row).text_encoder) == (mode, "random")


def test_the_row_goes_before_the_run_and_the_run_before_the_checkpoint(rows: Rows) -> None:
    found = rows(
        {
            "prompt": ["a", "b"],
            "num_frames": [97, None],
            "frame_rate": [None, 25],
            "stg_blocks": [[29, 28], None],
            "guidance_rescale": [0.0, None],
            "audio_guidance_scale": [None, 5],
        },
        defaults__num_frames=49,
        defaults__stg_blocks=[12],
        defaults__audio_guidance_scale=2,
        defaults__frame_rate=30,
    )
    a, b = map(video_of, found)
    assert (a.num_frames, a.frame_rate, a.stg_blocks) == (97, 30.0, (28, 29))
    assert (b.num_frames, b.frame_rate, b.stg_blocks) == (49, 25.0, (12,))
    assert (a.audio_guidance_scale, b.audio_guidance_scale) == (2.0, 5.0)
    assert [request_of(row).guidance_rescale for row in found] == [0.0, 0.7]


def test_what_a_row_may_say_a_run_may_say_for_all() -> None:
    of_clips = {field.name for field in fields(VideoSettings)} - {"video_mode", "text_encoder"}
    assert of_clips == set(CLIP_COLUMNS) <= set(DefaultsConfig.model_fields) <= set(COLUMNS)


def test_one_block_needs_no_list(rows: Rows) -> None:
    (row,) = rows({"prompt": ["a"]}, defaults__stg_blocks=7)
    assert video_of(row).stg_blocks == (7,)


def test_every_column_of_a_clip_reaches_its_settings(rows: Rows) -> None:
    other = {"num_frames": 9, "frame_rate": 12.0, "stg_blocks": [3]}
    columns = {name: [other.get(name, 0.25)] for name in CLIP_COLUMNS}
    video = video_of(rows({"prompt": ["a"], **columns})[0])
    for name, (value,) in columns.items():
        assert getattr(video, name) == (tuple(value) if isinstance(value, list) else value)


def test_however_blocks_are_written_it_is_the_same_clip(rows: Rows) -> None:
    written: list[Any] = [
        [[28, 29]],
        [[29, 28, 29]],
        ["28,29"],
        ["[28, 29]"],
        pa.array([[28, 29]], pa.large_list(pa.uint8())),
    ]
    found = [rows({"prompt": ["a"], "seed": [1], "stg_blocks": blocks})[0] for blocks in written]
    assert len({request_of(row).request_id for row in found}) == 1
    # A row without a seed derives it from its content, not from how that is stored.
    found = [rows({"prompt": ["a"], "stg_blocks": blocks})[0] for blocks in written]
    assert len({request_of(row).seed for row in found}) == 1
    (one, two) = rows({"prompt": ["a"] * 2, "seed": [1, 1], "stg_blocks": [[29], None]})
    assert request_of(one) == request_of(two)
    (whole,) = rows({"prompt": ["a"], "seed": [1], "stg_blocks": [29], "frame_rate": [24]})
    assert request_of(whole) == request_of(one)


BAD: list[tuple[str, str, Any, str]] = [
    ("one_stage", "num_frames", 120, "num_frames is 120; LTX-2 needs a multiple of 8 and one. "
     "Use 113 or 121."),
    ("one_stage", "num_frames", 0, "num_frames is 0; it must be 1 to 100000."),
    ("one_stage", "num_frames", 2, "num_frames is 2; LTX-2 needs a multiple of 8 and one. "
     "Use 1 or 9."),
    ("one_stage", "height", 500, "height is 500; LTX-2 needs a multiple of 32. Use 480 or 512."),
    ("one_stage", "width", 20, "width is 20; LTX-2 needs a multiple of 32. Use 32."),
    ("two_stage", "width", 96, "width is 96; LTX-2 in two stages needs a multiple of 64. "
     "Use 64 or 128."),
    ("one_stage", "frame_rate", 120.0, "frame_rate is 120; LTX-2 takes 1 to 60 frames per second. "
     "Use 60."),
    ("one_stage", "frame_rate", 0.5, "frame_rate is 0.5; LTX-2 takes 1 to 60 frames per second. "
     "Use 1."),
    ("one_stage", "frame_rate", float("nan"), "frame_rate is nan; it must be 0 to 1000."),
    ("distilled", "num_inference_steps", 30, "num_inference_steps is 30; a distilled LTX-2 has "
     "8 steps. Use 8 or leave it out."),
    ("one_stage", "stg_blocks", [29, 48, 50], "stg_blocks has 48, 50; this LTX-2 has blocks 0 "
     "to 47."),
    ("one_stage", "stg_blocks", [], "stg_blocks is empty and stg_scale is above 0; name the blocks "
     "whose self attention is left out, or set stg_scale and audio_stg_scale to 0."),
    ("one_stage", "stg_blocks", "29;30", 'stg_blocks is "29;30"; it must be whole numbers such as '
     "28,29."),
    ("one_stage", "audio_guidance_scale", float("inf"), "audio_guidance_scale is inf; it must be "
     "0 to 100."),
    ("one_stage", "guidance_rescale", 1.5, "guidance_rescale is 1.5; it must be 0 to 1."),
    ("one_stage", "sampler", "ddim", 'sampler is "ddim"; LTX-2 offers euler. Choose one of these, '
     "or leave it null."),
    ("one_stage", "strength", 0.5, "strength is 0.5; LTX-2 makes clips. Leave it null."),
    ("one_stage", "task", "txt2img", "task is txt2img; LTX-2 offers txt2vid and img2vid. Choose "
     "one of these."),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "name", "value", "message"), BAD)
def test_a_clip_that_cannot_be_made_names_the_nearest_that_can(
    rows: Rows, mode: str, name: str, value: Any, message: str
) -> None:
    columns = {"prompt": ["a", "b"], name: [value, None]}
    bad, good = rows(columns, ltx2__mode=mode)
    assert bad.error == f"row 0: {message}"
    request_of(good)


def test_a_rate_that_the_run_s_format_cannot_show_is_the_row_s_error(rows: Rows) -> None:
    columns = {"prompt": ["a", "b"], "frame_rate": [60.0, 50.0]}
    fast, fine = rows(columns, output__video="gif")
    assert fast.error == (
        "row 0: frame_rate is 60; a GIF shows at most 50 frames a second. Use 50 or less, or "
        "output.video mp4."
    )
    assert fine.error is None
    assert [row.error for row in rows(columns)] == [None, None]
    with pytest.raises(ConfigError, match=r"defaults\.frame_rate is 60; a GIF shows"):
        rows({"prompt": ["a"]}, output__video="gif", defaults__frame_rate=60)


def test_without_guidance_no_blocks_are_needed(rows: Rows) -> None:
    nothing = {"stg_scale": [0.0], "audio_stg_scale": [0.0]}
    assert video_of(rows({"prompt": ["a"], "stg_blocks": [[]], **nothing})[0]).stg_blocks == ()


def test_all_that_is_wrong_with_a_clip_is_said_at_once(rows: Rows) -> None:
    (row,) = rows(
        {
            "prompt": ["a"],
            "height": [500],
            "num_frames": [120],
            "frame_rate": [120.0],
            "sampler": ["lms"],
            "stg_blocks": [[99]],
            "modality_scale": [-1.0],
            "init_image": ["https://x.org/a.png"],
        }
    )
    parts = ("row 0: modality_scale is -1.0", "height is 500", 'sampler is "lms"', "Use 113 or 121")
    parts = (*parts, "frame_rate is 120", "stg_blocks has 99", "URLs are not fetched")
    assert all(part in str(row.error) for part in parts), row.error


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"height": 500}, "defaults.height is 500; LTX-2 needs a multiple of 32. Use 480 or 512."),
        ({"num_frames": 120}, "defaults.num_frames is 120; .* Use 113 or 121."),
        ({"frame_rate": 120}, "defaults.frame_rate is 120; .* Use 60."),
        ({"stg_blocks": [48]}, "defaults.stg_blocks has 48; this LTX-2 has blocks 0 to 47."),
        ({"sampler": "ddim"}, 'defaults.sampler is "ddim"; LTX-2 offers euler.'),
        ({"strength": 0.5}, "defaults.strength is 0.5; LTX-2 makes clips. Leave it null."),
        ({"num_frames": 120, "sampler": "ddim"}, "defaults.sampler .* defaults.num_frames"),
    ],
)
def test_a_default_that_no_clip_can_have_ends_the_run_at_once(
    rows: Rows, defaults: dict[str, Any], message: str
) -> None:
    overrides = {f"defaults__{name}": value for name, value in defaults.items()}
    with pytest.raises(ConfigError, match=message):
        rows({"prompt": ["a"]}, **overrides)


def test_a_default_of_another_number_of_steps_than_a_distilled_checkpoint_has(rows: Rows) -> None:
    run = {"ltx2__mode": "distilled", "defaults__num_inference_steps": 30}
    with pytest.raises(
        ConfigError, match=r"defaults\.num_inference_steps is 30; .* 8 steps\. Use 8 or leave it"
    ):
        rows({"prompt": ["a"]}, **run)
    # Where rows name their models it is the row's error, and only of rows that leave it open.
    bad, good = rows(
        {"prompt": ["a", "b"], "model": ["ltx2", "ltx2"], "num_inference_steps": [None, 8]}, **run
    )
    assert str(bad.error).startswith("row 0: defaults.num_inference_steps is 30;")
    request_of(good)


@pytest.mark.parametrize("mode", ["two_stage", "distilled_two_stage"])
def test_two_stages_without_an_upsampler_are_the_run_s_error(rows: Rows, mode: str) -> None:
    message = rf"ltx2\.mode is {mode}; that needs a latent upsampler, which bare is without\."
    with pytest.raises(ConfigError, match=message):
        rows({"prompt": ["a"]}, model__name="bare", ltx2__mode=mode)
    # A checkpoint that a row names costs no row of another one anything.
    bad, good = rows({"prompt": ["a", "b"], "model": ["bare", "sdxl"]}, ltx2__mode=mode)
    assert f"row 0: model: ltx2.mode is {mode}" in str(bad.error)
    assert request_of(good).video is None


@pytest.mark.parametrize("name", CLIP_COLUMNS)
def test_what_says_something_of_clips_says_nothing_to_images(rows: Rows, name: str) -> None:
    value = CLIP_COLUMNS[name]
    shown = "28,29" if name == "stg_blocks" else value
    message = f"{name} is {shown}; SDXL makes images. Leave it null."
    columns = {"prompt": ["a", "b"], name: [value, None]}
    bad, good = rows(columns, model__name="sdxl")
    assert bad.error == f"row 0: {message}"
    assert request_of(good).video is None
    with pytest.raises(ConfigError, match=f"^defaults.{message}"):
        rows({"prompt": ["a"]}, model__name="sdxl", **{f"defaults__{name}": value})


def test_a_run_of_both_gives_each_what_it_understands(rows: Rows) -> None:
    image, clip = rows(
        {"prompt": ["a", "b"], "model": ["sdxl", "ltx2"]},
        defaults__num_frames=49,
        defaults__stg_scale=0.5,
        defaults__strength=0.5,
        defaults__guidance_scale=4.0,
    )
    assert (request_of(image).video, request_of(image).guidance_rescale) == (None, 0.0)
    assert (video_of(clip).num_frames, video_of(clip).stg_scale) == (49, 0.5)
    assert (request_of(clip).strength, request_of(clip).guidance_rescale) == (None, 0.7)
    assert {request_of(row).guidance_scale for row in (image, clip)} == {4.0}


def test_a_clip_may_start_from_an_image(rows: Rows, tmp_path: Path) -> None:
    Image.new("RGB", (40, 24)).save(tmp_path / "first.png")
    columns = {"prompt": ["a", "b"], "init_image": ["first.png", None], "num_frames": [9, 1]}
    given, free = map(request_of, rows(columns))
    assert (given.task, given.strength, free.task) == ("img2vid", None, "txt2vid")
    assert given.init_image == str(tmp_path / "first.png")
    assert given.init_image_sha256 is not None
    assert free.video is not None
    assert free.video.num_frames == 1
