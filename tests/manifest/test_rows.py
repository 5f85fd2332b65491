"""read_rows: precedence, tasks, seeds, errors that cost one row only, columns passed through."""

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raydiff.config import RunConfig, load_config
from raydiff.errors import ConfigError, ManifestError, ModelError
from raydiff.manifest.reader import Manifest, open_manifest, prompts_manifest
from raydiff.manifest.rows import extra_schema, read_rows
from raydiff.request import ManifestRow, ModelInfo, RenderRequest, with_request_id
from tests.manifest.known_models import SDXL

SD21 = ModelInfo(
    name="sd21",
    family="sd21",
    path="/models/sd21",
    revision="local-sd21",
    tasks=("txt2img",),
    default_height=768,
    default_width=768,
    size_multiple=64,
    default_num_inference_steps=25,
    default_guidance_scale=7.5,
    default_strength=0.8,
    default_sampler="ddim",
    num_parameters={"unet": 865_910_724},
)


def models(name: str) -> ModelInfo:
    for info in (SDXL, SD21):
        if info.name == name:
            return info
    raise ModelError(f'"{name}" is no model. Name sdxl or sd21.')


def save(path: Path, columns: dict[str, Any]) -> Manifest:
    pq.write_table(pa.table(columns), path)
    return open_manifest(path)


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., list[ManifestRow]]:
    """Read rows of columns given in place; keywords with __ are the run's config."""

    def read(columns: dict[str, Any], **overrides: Any) -> list[ManifestRow]:
        manifest = save(tmp_path / "m.parquet", columns)
        config = load_config(overrides={k.replace("__", "."): v for k, v in overrides.items()})
        return list(read_rows(manifest, config=config, models=models))

    return read


Rows = Callable[..., list[ManifestRow]]


def request_of(row: ManifestRow) -> RenderRequest:
    assert row.error is None
    assert row.request is not None
    return row.request


def error_of(row: ManifestRow) -> str:
    assert row.request is None
    assert row.error is not None
    return row.error


def test_a_prompt_alone_takes_the_model_s_defaults(rows: Rows) -> None:
    (row,) = rows({"prompt": ["a lighthouse"]})
    request = request_of(row)
    assert (row.row_index, row.image_index, row.extra) == (0, 0, None)
    expected = RenderRequest(
        model="sdxl",
        model_revision="local-sdxl",
        task="txt2img",
        prompt="a lighthouse",
        negative_prompt=None,
        seed=request.seed,
        height=1024,
        width=1024,
        num_inference_steps=30,
        guidance_scale=5.0,
        guidance_rescale=0.0,
        sampler="euler",
    )
    assert request == with_request_id(expected)


def test_the_row_goes_before_the_run_and_the_run_before_the_model(rows: Rows) -> None:
    found = rows(
        {
            "prompt": ["a", "b", "c"],
            "model": ["sd21", None, "sdxl"],
            "height": [512, None, 640],
            "guidance_scale": [None, 3.5, None],
            "negative_prompt": ["", None, "dull"],
            "num_inference_steps": pa.nulls(3),
        },
        defaults__width=896,
        defaults__guidance_scale=9,
        defaults__negative_prompt="blurry",
        defaults__sampler="unipc",
    )
    a, b, c = map(request_of, found)
    assert (a.model, a.height, a.width, a.num_inference_steps) == ("sd21", 512, 896, 25)
    assert (b.model, b.height, b.width, b.num_inference_steps) == ("sdxl", 1024, 896, 30)
    assert (c.model, c.height, c.width, c.num_inference_steps) == ("sdxl", 640, 896, 30)
    assert [r.guidance_scale for r in (a, b, c)] == [9.0, 3.5, 9.0]
    assert [r.negative_prompt for r in (a, b, c)] == ["", "blurry", "dull"]
    assert {r.sampler for r in (a, b, c)} == {"unipc"}


def test_num_images_are_requests_of_following_seeds(rows: Rows) -> None:
    found = rows({"prompt": ["a", "b", "c"], "num_images": [3, None, 1], "seed": [40, 7, None]})
    where = [(row.row_index, row.image_index) for row in found]
    assert where == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)]
    requests = [request_of(row) for row in found]
    assert [r.seed for r in requests[:4]] == [40, 41, 42, 7]
    assert len({r.request_id for r in requests}) == 5


def test_a_missing_seed_depends_on_the_row_alone(rows: Rows) -> None:
    columns = {"prompt": ["a", "a", "b"], "num_images": [2, 1, 1]}
    seeds = [request_of(row).seed for row in rows(columns)]
    assert seeds[1] == seeds[0] + 1
    assert len(set(seeds)) == 4
    # Another model, default or passed-through column starts from the same noise.
    others = rows(
        {**columns, "id": ["x", "y", "z"]}, model__name="sd21", defaults__guidance_scale=2
    )
    assert [request_of(row).seed for row in others] == seeds
    assert {request_of(row).seed for row in rows(columns, defaults__seed=5)} == {5, 6}


def test_a_seed_whose_images_pass_the_largest_seed(rows: Rows) -> None:
    last = 2**63 - 1
    good, bad = rows({"prompt": ["a", "b"], "seed": [last, last], "num_images": [1, 2]})
    assert request_of(good).seed == last
    assert f"row 1: seed is {last}; with num_images it passes 2^63 - 1." in error_of(bad)


def test_equal_rows_are_equal_requests(rows: Rows) -> None:
    found = rows(
        {"prompt": ["a"] * 3, "seed": [1, 1, 1], "guidance_scale": [5, None, None], "id": [1, 2, 3]}
    )
    assert len({request_of(row).request_id for row in found}) == 1
    assert [row.row_index for row in found] == [0, 1, 2]


@pytest.mark.parametrize("prompt", ["", "a\0b", "two\nlines", "../../etc/passwd", "é☕" * 50_000])
def test_any_text_is_a_prompt(rows: Rows, prompt: str) -> None:
    (row,) = rows({"prompt": [prompt]})
    assert request_of(row).prompt == prompt


BAD_VALUES: list[tuple[str, Any, str]] = [
    ("prompt", None, "prompt is null; every row needs one. It may be an empty text."),
    ("height", 500, "height is 500; SDXL needs a multiple of 8. Use 496 or 504."),
    ("width", 17, "width is 17; SDXL needs a multiple of 8. Use 16 or 24."),
    ("width", 16383, "width is 16383; SDXL needs a multiple of 8. Use 16376 or 16384."),
    ("height", 0, "height is 0; it must be 16 to 16384."),
    ("sampler", "dpmpp2m", 'sampler is "dpmpp2m"; did you mean "dpmpp_2m"? known: '),
    ("guidance_scale", math.nan, "guidance_scale is nan; it must be 0 to 100."),
    ("num_inference_steps", 0, "num_inference_steps is 0; it must be 1 to 1000."),
    ("strength", 1.5, "strength is 1.5; it must be 0 to 1."),
    ("strength", -0.5, "strength is -0.5; it must be 0 to 1."),
    ("seed", 1.5, "seed is 1.5; it must be a whole number."),
    ("num_images", 0, "num_images is 0; it must be 1 to 4096."),
    ("model", "sd3", 'model: "sd3" is no model. Name sdxl or sd21.'),
    ("task", "txt2img2", 'task is "txt2img2"; did you mean "txt2img"? known: '),
    ("task", "txt2vid", "task is txt2vid; SDXL offers txt2img and img2img. Choose one of these."),
    (
        "task",
        "img2img",
        "task is img2img and init_image is null. Give an image, or leave task null",
    ),
    ("num_frames", 16, "num_frames is 16; SDXL makes images. Leave it null."),
    ("frame_rate", 24.0, "frame_rate is 24.0; SDXL makes images. Leave it null."),
    ("init_image", "no.png", 'init_image "no.png" in '),
    ("prompt", "x" * 1_000_001, "prompt has 1,000,001 characters; 1,000,000 are allowed."),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_VALUES)
def test_a_bad_row_costs_no_other_row_anything(
    rows: Rows, name: str, value: Any, message: str
) -> None:
    good = {"prompt": "fine", "seed": 3}.get(name)
    columns = {"prompt": ["a", "b", "c"], "seed": [1, 2, 3], name: [good, value, good]}
    first, bad, last = rows(columns)
    assert error_of(bad).startswith(f"row 1: {message}")
    assert (bad.row_index, bad.image_index) == (1, 0)
    request_of(first)
    request_of(last)


def test_all_that_is_wrong_with_a_row_is_said_at_once(rows: Rows) -> None:
    (row,) = rows(
        {
            "prompt": pa.array([None], pa.string()),
            "height": [500],
            "width": [-8],
            "sampler": ["eulr"],
            "num_frames": [3],
            "init_image": ["https://x.org/a.png"],
            "num_inference_steps": [2],
            "strength": [0.1],
            "num_images": [3],
        }
    )
    message = error_of(row)
    for part in (
        "row 0: ",
        "prompt is null",
        "height is 500",
        "width is -8",
        'did you mean "euler"?',
        "num_frames is 3",
        "URLs are not fetched",
        "strength is 0.1; it leaves none of 2 steps",
    ):
        assert part in message


def test_an_image_model_takes_one_frame(rows: Rows) -> None:
    (row,) = rows({"prompt": ["a"], "num_frames": [1], "frame_rate": pa.nulls(1)})
    request_of(row)


def test_a_default_that_a_row_s_model_cannot_use_says_so(rows: Rows) -> None:
    good, bad = rows({"prompt": ["a", "b"], "model": ["sdxl", "sd21"]}, defaults__height=1000)
    request_of(good)
    assert error_of(bad) == (
        "row 1: defaults.height is 1000; SD 2.1 needs a multiple of 64. Use 960 or 1024."
    )


def test_a_default_that_no_row_can_use_ends_the_run_at_once(tmp_path: Path) -> None:
    manifest = save(tmp_path / "m.parquet", {"prompt": ["a"]})

    def refusal(**overrides: Any) -> str:
        config = load_config(overrides={k.replace("__", "."): v for k, v in overrides.items()})
        with pytest.raises(ConfigError) as caught:
            read_rows(manifest, config=config, models=models)
        return str(caught.value)

    assert refusal(defaults__width=1000, model__name="sd21") == (
        "defaults.width is 1000; SD 2.1 needs a multiple of 64. Use 960 or 1024."
    )
    assert 'sampler is "eulr"; did you mean "euler"?' in refusal(defaults__sampler="eulr")
    assert "is not a folder" in refusal(input__root=str(tmp_path / "no"))


def test_the_run_s_own_model_is_the_caller_s_concern(tmp_path: Path) -> None:
    config = load_config(overrides={"model.name": "sd3"})
    manifest = save(tmp_path / "m.parquet", {"prompt": ["a"]})
    with pytest.raises(ModelError, match="sd3"):
        read_rows(manifest, config=config, models=models)
    mixed = save(tmp_path / "n.parquet", {"prompt": ["a", "b"], "model": ["sdxl", None]})
    found = read_rows(mixed, config=config, models=models)
    request_of(next(found))
    with pytest.raises(ModelError, match="sd3"):
        next(found)


def test_an_unused_default_model_is_not_looked_up(tmp_path: Path) -> None:
    asked = []

    def counting(name: str) -> ModelInfo:
        asked.append(name)
        return models(name)

    manifest = save(tmp_path / "m.parquet", {"prompt": ["a"] * 50, "model": ["sd21"] * 50})
    assert len(list(read_rows(manifest, config=RunConfig(), models=counting))) == 50
    assert asked == ["sd21"]


def test_a_wrong_model_is_asked_for_once(tmp_path: Path) -> None:
    asked = []

    def counting(name: str) -> ModelInfo:
        asked.append(name)
        return models(name)

    manifest = save(tmp_path / "m.parquet", {"prompt": ["a"] * 50, "model": ["sd3", "sdxl"] * 25})
    found = list(read_rows(manifest, config=RunConfig(), models=counting))
    assert [row.error is None for row in found] == [False, True] * 25
    assert asked == ["sd3", "sdxl"]


def test_limit_counts_manifest_rows(rows: Rows) -> None:
    found = rows({"prompt": [f"{i}" for i in range(9)], "num_images": [2] * 9}, limit=3)
    assert [row.row_index for row in found] == [0, 0, 1, 1, 2, 2]


def save_image(path: Path) -> None:
    Image.radial_gradient("L").resize((40, 24)).save(path)


def test_an_init_image_makes_img2img(rows: Rows, tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    found = rows(
        {
            "prompt": ["a", "b", "c", "d"],
            "init_image": ["a.png", None, "a.png", "a.png"],
            "strength": [0.5, 0.5, None, None],
            "task": [None, None, "img2img", "txt2img"],
        }
    )
    a, b, c = (request_of(row) for row in found[:3])
    assert (a.task, a.strength, a.init_image) == ("img2img", 0.5, str(tmp_path / "a.png"))
    assert (b.task, b.strength, b.init_image, b.init_image_sha256) == ("txt2img", None, None, None)
    assert (c.task, c.strength) == ("img2img", 0.3)
    assert a.init_image_sha256 == c.init_image_sha256
    assert error_of(found[3]) == (
        "row 3: task is txt2img and init_image is given. Leave one of them out."
    )


def test_a_model_without_img2img_refuses_init_images(rows: Rows, tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    (row,) = rows({"prompt": ["a"], "init_image": ["a.png"]}, model__name="sd21")
    assert error_of(row) == "row 0: init_image is given; SD 2.1 offers txt2img only."


def test_init_images_come_from_the_input_root(rows: Rows, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    save_image(tmp_path / "images" / "a.png")
    save_image(tmp_path / "b.png")
    root = str(tmp_path / "images")
    columns = {"prompt": ["a", "b"], "init_image": ["a.png", "../b.png"]}
    good, bad = rows(columns, input__root=root)
    assert request_of(good).init_image == f"{root}/a.png"
    assert "outside the input root" in error_of(bad)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 29, 30, 50, 999, 1000])
def test_the_strength_that_is_advised_works(rows: Rows, tmp_path: Path, steps: int) -> None:
    save_image(tmp_path / "a.png")
    columns = {"prompt": ["a"], "init_image": ["a.png"], "num_inference_steps": [steps]}
    (bad,) = rows({**columns, "strength": [0.0]})
    advised = re.search(rf"none of {steps} steps\. Use (\S+) or more", error_of(bad))
    assert advised
    (good,) = rows({**columns, "strength": [float(advised[1])]})
    assert int(steps * (request_of(good).strength or 0)) >= 1


def test_other_columns_pass_through_unchanged(rows: Rows, tmp_path: Path) -> None:
    extra = {
        "id": pa.array(range(3000), pa.int32()),
        "status": [f"s{i}" for i in range(3000)],
        "tags": [[f"t{i}", None] for i in range(3000)],
        "when": pa.array(range(3000), pa.timestamp("us", tz="UTC")),
    }
    columns = {"prompt": ["a"] * 3000, "seed": [None] * 2999 + [-1], **extra}
    found = rows({**columns, "num_images": [2] + [1] * 2999})
    schema = extra_schema(open_manifest(tmp_path / "m.parquet"))
    assert schema.names == ["id", "manifest_status", "tags", "when"]
    assert all(row.extra.schema.equals(schema) and row.extra.num_rows == 1 for row in found)
    error_of(found[-1])
    expected = pa.table(extra).rename_columns(schema.names).cast(schema)
    assert pa.Table.from_batches([row.extra for row in found[1:]]).equals(expected)
    assert found[0].extra.equals(found[1].extra)


def test_prompts_given_in_place_are_rows() -> None:
    found = list(read_rows(prompts_manifest(["a", "b"]), config=RunConfig(limit=1), models=models))
    assert [request_of(row).prompt for row in found] == ["a"]


def test_a_damaged_file_ends_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    save(path, {"prompt": [f"prompt {i}" for i in range(9000)]})
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\xff" * 3000 + whole[3004:])
    with pytest.raises(ManifestError, match="is damaged"):
        list(read_rows(open_manifest(path), config=RunConfig(), models=models))


def test_a_million_rows_are_read_in_less_than_a_minute(tmp_path: Path) -> None:
    num_rows = 20_000
    manifest = save(
        tmp_path / "m.parquet",
        {
            "prompt": [f"a lighthouse at dusk, oil on canvas, number {i}" for i in range(num_rows)],
            "seed": [None if i % 2 else i for i in range(num_rows)],
            "guidance_scale": [7.5] * num_rows,
            "id": list(range(num_rows)),
        },
    )
    start_s = time.process_time()
    count = sum(1 for row in read_rows(manifest, config=RunConfig(), models=models) if row.request)
    elapsed_s = time.process_time() - start_s
    assert count == num_rows
    assert elapsed_s / num_rows < 60 / 1_000_000
