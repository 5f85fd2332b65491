"""RowChecks against read_rows, row by row, on random manifests: the same images, bad rows,
messages and shapes, and keys that are equal where the requests are."""

import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raydiff.config import RunConfig, load_config
from raydiff.errors import ConfigError, ModelError
from raydiff.manifest import row_checks
from raydiff.manifest.reader import Manifest, open_manifest
from raydiff.manifest.row_checks import RowChecks
from raydiff.manifest.rows import read_rows
from raydiff.manifest.schema import MAX_SEED
from raydiff.request import ModelInfo, batch_key
from tests.manifest.known_models import LTX2, without_upsampler

MAX_ERRORS = 7


def model(name: str, revision: str, multiple: int, size: int) -> ModelInfo:
    return ModelInfo(
        name=name,
        family="sd21",
        path=f"/models/{name}",
        revision=revision,
        tasks=("txt2img", "img2img"),
        default_height=size,
        default_width=size,
        size_multiple=multiple,
        default_num_inference_steps=25,
        default_guidance_scale=7.5,
        default_strength=0.8,
        default_sampler="ddim",
        num_parameters={},
    )


# The second is the first under another name: their requests are equal.
IMAGE_MODELS = {
    "small": model("small", "local-1", 64, 512),
    "copy": model("copy", "local-1", 64, 512),
    "large": model("large", "abc123", 8, 1024),
}
CLIP_MODELS = {
    "clips": replace(LTX2, name="clips"),
    "one_stage": without_upsampler(LTX2, name="one_stage", revision="def456"),
}
MODELS = IMAGE_MODELS | CLIP_MODELS


def find(name: str) -> ModelInfo:
    try:
        return MODELS[name]
    except KeyError:
        raise ModelError(f"{name!r} is no model") from None


def check_against_rows(manifest: Manifest, config: RunConfig) -> tuple[int, int, int]:
    """Compare both readings; return how many images, distinct requests and bad rows there are."""
    rows = list(read_rows(manifest, config=config, models=find))
    checks = RowChecks(manifest, config=config, models=find, max_errors=MAX_ERRORS)
    found = [
        image
        for images in checks
        for image in zip(*(column.tolist() for column in images), strict=True)
    ]
    assert [image[:2] for image in found] == [(row.row_index, row.image_index) for row in rows]
    assert checks.errors == [row.error for row in rows if row.error][:MAX_ERRORS]
    ids: dict[int, str] = {}
    for (_, _, key, shape), row in zip(found, rows, strict=True):
        assert (shape < 0) == (row.request is None)
        if row.request is not None:
            asked = batch_key(row.request)
            assert checks.shapes[shape] == asked
            assert ids.setdefault(key, row.request.request_id) == row.request.request_id
    requests = [row.request.request_id for row in rows if row.request]
    assert len(ids) == len(set(requests))
    return len(rows), len(ids), len(rows) - len(requests)


def random_columns(rng: random.Random, num_rows: int, run_model: str) -> dict[str, Any]:
    """Return columns in which good values are the rule and equal rows common."""
    names_model = rng.random() < 0.6
    is_clip = [
        rng.random() < 0.5 if names_model else run_model in CLIP_MODELS for _ in range(num_rows)
    ]

    def column(
        of_images: list[Any],
        type_: pa.DataType,
        bad: list[Any] = [],  # noqa: B006
        of_clips: list[Any] | None = None,
    ) -> pa.Array:
        null_share = rng.choice([0, 0, 0.3, 1])
        choices = (of_images, of_images if of_clips is None else of_clips)
        cells = [None if rng.random() < null_share else rng.choice(choices[is_]) for is_ in is_clip]
        for value in bad:
            if rng.random() < 0.5:
                cells[rng.randrange(num_rows)] = value
        return pa.array(cells, type_)

    def clip_column(values: list[Any], type_: pa.DataType, bad: list[Any]) -> pa.Array:
        return column([None], type_, bad, values)

    prompts = [None, "", "a cat", "a dog ☕", 'quotes "\\"', "\x00\x7f\n", "長い" * 5]
    columns = {
        "prompt": pa.array([rng.choice(prompts[1:]) for _ in range(num_rows)]),
        "negative_prompt": column(["", "blurry", "bad\tart"], pa.large_string()),
        "model": column(list(IMAGE_MODELS), pa.string(), ["none"], list(CLIP_MODELS)),
        "task": column(["txt2img"], pa.string(), ["img2img", "img2vid", "paint"], ["txt2vid"]),
        "seed": rng.choice(
            [
                column([0, 1, 2**40, MAX_SEED], pa.int64(), [-1]),
                column([0.0, 1.0, 2.0**53], pa.float64(), [0.5, float("nan"), 2.0**60, -2.0]),
                column([0, 1, 7], pa.uint64(), [2**64 - 1, 2**63]),
                column([3, 4], pa.decimal128(10, 2)),
            ]
        ),
        "num_images": column([1, 1, 1, 3], pa.int32(), [0, 4097]),
        "height": column([512, 512, 576], pa.int64(), [500, 10]),
        "width": column([512.0, 576.0], pa.float32(), [512.5]),
        "num_frames": column([1], pa.int8(), [2], [9, 17, 17]),
        "frame_rate": clip_column([24.0, 25.0], pa.float64(), [120.0]),
        "num_inference_steps": column([25, 30], pa.int16(), [0], [8]),
        "guidance_scale": column([7.5, 0.0, -0.0], pa.float64(), [float("nan"), -1.0]),
        "sampler": column(["ddim", "euler"], pa.string(), ["eular"], ["euler"]),
        "strength": column([0.5, 0.0], pa.float64(), [], [None]),
        "init_image": column([None, None, "image.png"], pa.string(), ["gone.png"]),
        "stg_scale": clip_column([1.0, 0.0, -0.0], pa.float32(), [-1.0]),
        "stg_blocks": rng.choice(
            [
                clip_column([[29], [28, 29], [29, 28]], pa.list_(pa.int64()), [[], [48], [None]]),
                clip_column([[0], [1, 2]], pa.large_list(pa.uint8()), [[200]]),
                clip_column(["29", "28,29", "[29, 28]"], pa.string(), ["all"]),
                clip_column([29, 28], pa.int32(), [48]),
            ]
        ),
        "modality_scale": clip_column([3.0, 1.0], pa.float64(), [101.0]),
        "audio_guidance_scale": clip_column([7, 1], pa.int64(), [-1]),
        "extra": pa.array(range(num_rows)),
    }
    # A null prompt now and then, and texts as pandas writes categories.
    if rng.random() < 0.5:
        columns["prompt"] = pa.array([rng.choice(prompts) for _ in range(num_rows)], pa.string())
    if rng.random() < 0.5:
        columns["prompt"] = columns["prompt"].dictionary_encode()
    wanted = {name for name in columns if rng.random() < 0.6} - {"model"} | {"prompt"}
    wanted |= {"model"} if names_model else set()
    return {name: column for name, column in columns.items() if name in wanted}


def random_config(rng: random.Random) -> RunConfig:
    overrides: dict[str, Any] = {"model.name": rng.choice(["small", "small", "clips"])}
    choices: dict[str, list[Any]] = {
        "defaults.negative_prompt": ["blurry", ""],
        "defaults.seed": [1, MAX_SEED - 1],
        "defaults.num_images": [2],
        "defaults.guidance_scale": [7.5, 3.0],
        "defaults.height": [576],
        "defaults.num_frames": [33],
        "defaults.stg_blocks": [[3, 2]],
        "ltx2.mode": ["two_stage", "distilled"],
        "limit": [17],
    }
    for name, values in choices.items():
        if rng.random() < 0.25:
            overrides[name] = rng.choice(values)
    return load_config(overrides=overrides)


@pytest.mark.parametrize("seed", range(24))
def test_random_manifests_are_read_alike(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    # Small pieces, so that rows of one manifest lie in several.
    monkeypatch.setattr(row_checks, "CHUNK_ROWS", rng.choice([40, 65_536]))
    monkeypatch.setattr(row_checks, "MAX_CHUNK_IMAGES", rng.choice([5, 2**20]))
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    num_rows = rng.choice([1, 200])
    config = random_config(rng)
    table = pa.table(random_columns(rng, num_rows, config.model.name))
    pq.write_table(table, tmp_path / "m.parquet", row_group_size=64)
    manifest = open_manifest(tmp_path / "m.parquet")
    try:
        read_rows(manifest, config=config, models=find)
    except ConfigError as error:
        with pytest.raises(ConfigError, match=f"^{re.escape(str(error))}$"):
            RowChecks(manifest, config=config, models=find, max_errors=MAX_ERRORS)
    else:
        check_against_rows(manifest, config)


Save = Callable[[dict[str, Any]], Manifest]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write columns to a manifest and open it."""

    def write(columns: dict[str, Any]) -> Manifest:
        pq.write_table(pa.table(columns), tmp_path / "m.parquet")
        return open_manifest(tmp_path / "m.parquet")

    return write


def test_equal_requests_have_equal_keys_however_they_are_written(save: Save) -> None:
    columns = {
        "prompt": ["a cat"] * 6,
        "seed": [4, 4, 4, 4, 4, 3],
        "model": ["small", "copy", "small", "small", "large", "small"],
        "guidance_scale": [None, 7.5, 7.5, None, None, None],
        "negative_prompt": [None, None, None, "", None, None],
        "num_images": [1, 1, 1, 1, 1, 2],
    }
    manifest = save(columns)
    assert check_against_rows(manifest, load_config(overrides={"model.name": "small"})) == (7, 4, 0)


def test_text_that_is_not_utf8_or_too_long_is_bad(save: Save) -> None:
    raw = pa.array([b"fine", b"\xff\xfe", None, "é".encode() * 600_000, b"x" * 1_000_001])
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers(), raw.null_count)
    manifest = save({"prompt": text, "seed": [1] * 5})
    config = load_config(overrides={"model.name": "small"})
    assert check_against_rows(manifest, config) == (5, 2, 3)
    manifest = save({"prompt": ["x"] * 5, "negative_prompt": text, "seed": [1] * 5})
    assert check_against_rows(manifest, config) == (5, 3, 2)
    manifest = save({"prompt": ["x"] * 5, "model": text})
    assert check_against_rows(manifest, config) == (5, 1, 4)


def test_rows_without_a_seed_differ_by_their_index(save: Save) -> None:
    manifest = save({"prompt": ["a cat"] * 500})
    assert check_against_rows(manifest, load_config(overrides={"model.name": "small"})) == (
        500,
        500,
        0,
    )
