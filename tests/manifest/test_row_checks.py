"""RowChecks against read_rows, row by row, on random manifests: the same images, bad rows,
messages and shapes, and keys that are equal where the requests are."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raydiff.config import RunConfig, load_config
from raydiff.errors import ModelError
from raydiff.manifest import row_checks
from raydiff.manifest.reader import Manifest, open_manifest
from raydiff.manifest.row_checks import RowChecks
from raydiff.manifest.rows import read_rows
from raydiff.manifest.schema import MAX_SEED
from raydiff.request import ModelInfo, batch_key

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
MODELS = {
    "small": model("small", "local-1", 64, 512),
    "copy": model("copy", "local-1", 64, 512),
    "large": model("large", "abc123", 8, 1024),
}


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


def random_columns(rng: random.Random, num_rows: int) -> dict[str, Any]:
    """Return columns in which good values are the rule and equal rows common."""

    def column(values: list[Any], type_: pa.DataType, bad: list[Any] = []) -> pa.Array:  # noqa: B006
        null_share = rng.choice([0, 0, 0.3, 1])
        cells = [None if rng.random() < null_share else rng.choice(values) for _ in range(num_rows)]
        for value in bad:
            if rng.random() < 0.5:
                cells[rng.randrange(num_rows)] = value
        return pa.array(cells, type_)

    prompts = [None, "", "a cat", "a dog ☕", 'quotes "\\"', "\x00\x7f\n", "長い" * 5]
    columns = {
        "prompt": pa.array([rng.choice(prompts[1:]) for _ in range(num_rows)]),
        "negative_prompt": column(["", "blurry", "bad\tart"], pa.large_string()),
        "model": column(["small", "copy", "large"], pa.string(), ["none"]),
        "task": column(["txt2img"], pa.string(), ["img2img", "paint"]),
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
        "num_frames": column([1], pa.int8(), [2]),
        "frame_rate": column([None], pa.float64(), [24.0]),
        "num_inference_steps": column([25, 30], pa.int16(), [0]),
        "guidance_scale": column([7.5, 0.0, -0.0], pa.float64(), [float("nan"), -1.0]),
        "sampler": column(["ddim", "euler"], pa.string(), ["eular"]),
        "strength": column([0.5, 0.0], pa.float64()),
        "init_image": column([None, None, "image.png"], pa.string(), ["gone.png"]),
        "extra": pa.array(range(num_rows)),
    }
    # A null prompt now and then, and texts as pandas writes categories.
    if rng.random() < 0.5:
        columns["prompt"] = pa.array([rng.choice(prompts) for _ in range(num_rows)], pa.string())
    if rng.random() < 0.5:
        columns["prompt"] = columns["prompt"].dictionary_encode()
    wanted = [name for name in columns if name == "prompt" or rng.random() < 0.6]
    return {name: columns[name] for name in wanted}


def random_config(rng: random.Random) -> RunConfig:
    overrides: dict[str, Any] = {"model.name": "small"}
    choices: dict[str, list[Any]] = {
        "defaults.negative_prompt": ["blurry", ""],
        "defaults.seed": [1, MAX_SEED - 1],
        "defaults.num_images": [2],
        "defaults.guidance_scale": [7.5, 3.0],
        "defaults.height": [576],
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
    pq.write_table(
        pa.table(random_columns(rng, num_rows)), tmp_path / "m.parquet", row_group_size=64
    )
    check_against_rows(open_manifest(tmp_path / "m.parquet"), random_config(rng))


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
