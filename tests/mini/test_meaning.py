"""What the miniatures that ship with raydiff draw: what a caption asks for, through everything that
a run may do to it.

`raydiff bench mini` measures the same with 400 captions; these are a few of them.
"""

import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import raydiff
from raydiff.bench.mini import MINIATURES, held_out_scenes, render_batches, request_of, share
from raydiff.mini.draw import draw, table
from raydiff.mini.measure import Score, find_objects, score
from raydiff.mini.scenes import Color, Group, Relation, Scene, Shape, place
from raydiff.mini.show import to_uint8
from raydiff.output.ledger import read_results
from raydiff.pipelines.base import Pipeline
from raydiff.request import RenderRequest
from tests.cli.command import cli
from tests.engine.waiting import wait_for_rows

NUM_CAPTIONS = 48
NUM_MIXED = 16
NUM_RUN = 16
BATCH_SIZE = 16
ASKED = held_out_scenes(NUM_CAPTIONS)
BARS = {"color": 0.95, "shape": 0.85, "count": 0.80, "position": 0.80}

each_model = pytest.mark.parametrize("model", MINIATURES)


@cache
def pipeline(model: str) -> Pipeline:
    loaded: Pipeline = raydiff.load_pipeline(model)
    return loaded


def request(model: str, prompt: str, seed: int, **values: Any) -> RenderRequest:
    return request_of(pipeline(model).info, prompt, seed, **values)


def render(requests: Sequence[RenderRequest]) -> list[NDArray[np.uint8]]:
    return render_batches(pipeline(requests[0].model), requests, BATCH_SIZE)


@cache
def asked_pictures(model: str) -> list[NDArray[np.uint8]]:
    return render([request(model, text, seed) for seed, (_, text) in enumerate(ASKED)])


def scores(pictures: Sequence[NDArray[np.uint8]]) -> list[Score]:
    """Compare pictures of the first captions with their scenes."""
    return [score(scene, one) for (scene, _), one in zip(ASKED, pictures, strict=False)]


def assert_alike(pictures: Sequence[NDArray[np.uint8]], model: str) -> None:
    """The pictures show as much of what was asked for as those of a plain run, within a point."""
    ours, plain = scores(pictures), scores(asked_pictures(model)[: len(pictures)])
    for name in BARS:
        assert abs(share(ours, name) - share(plain, name)) <= 0.01, name


@each_model
def test_captions_that_no_training_has_seen(model: str) -> None:
    found = scores(asked_pictures(model))
    assert {name: share(found, name) for name in BARS if share(found, name) < BARS[name]} == {}


@each_model
def test_a_negative_prompt_removes_what_it_names(model: str) -> None:
    def colors_and_shapes(prompt: str, negative: str | None) -> list[tuple[str, str]]:
        pictures = render(
            [request(model, prompt, seed, negative_prompt=negative) for seed in range(16)]
        )
        return [(one.color, one.shape) for picture in pictures for one in find_objects(picture)]

    plain, without = (colors_and_shapes("two stars", negative) for negative in (None, "red stars"))
    assert sum(color == "red" for color, _ in plain) >= 2
    assert not any(color == "red" for color, _ in without)
    assert sum(shape == "star" for _, shape in without) >= 0.9 * len(without) >= 24
    plain, without = (colors_and_shapes("three shapes", negative) for negative in (None, "stars"))
    stars = [sum(shape == "star" for _, shape in one) for one in (plain, without)]
    assert stars[1] < stars[0] / 2


def two_large(first: tuple[Color, Shape], relation: Relation, second: tuple[Color, Shape]) -> Scene:
    """A scene of two large objects on white."""
    groups = [Group(count=1, size="large", color=one[0], shape=one[1]) for one in (first, second)]
    return Scene(groups=tuple(groups), relation=relation, background="white")


def foreground(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where a picture (H, W, 3) on white is not white."""
    return np.asarray(pixels.min(axis=-1) < 180)


@each_model
def test_img2img_keeps_the_layout_at_a_low_strength_and_follows_the_prompt_at_a_high_one(
    model: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(5)
    shown = two_large(("red", "circle"), "left", ("blue", "square"))
    wanted = two_large(("green", "star"), "above", ("yellow", "triangle"))
    placed = place(shown, rng)
    assert placed is not None
    pixels = to_uint8(draw(torch.from_numpy(table(shown, placed, rng))[None]))[0]
    Image.fromarray(pixels).save(tmp_path / "shown.png")
    prompt = "a large green star above a large yellow triangle"
    pictures = {
        strength: render(
            [
                request(
                    model,
                    prompt,
                    seed,
                    task="img2img",
                    init_image=str(tmp_path / "shown.png"),
                    strength=strength,
                )
                for seed in range(8)
            ]
        )
        for strength in (0.3, 0.9)
    }
    drawn = foreground(pixels)
    for picture in pictures[0.3]:
        kept = foreground(picture)
        assert (kept & drawn).sum() > 0.8 * (kept | drawn).sum()
    assert sum(score(wanted, one).is_right for one in pictures[0.9]) >= 7


@each_model
def test_batches_of_mixed_settings_keep_the_meaning(model: str) -> None:
    steps, scales = (16, 20, 24), (2.5, 3.0, 4.0)
    samplers = ("euler", "ddim", "dpmpp_2m", "heun")
    requests = [
        request(
            model,
            text,
            seed,
            num_inference_steps=steps[seed % 3],
            guidance_scale=scales[seed // 3 % 3],
            sampler=samplers[seed % 4],
        )
        for seed, (_, text) in enumerate(ASKED[:NUM_MIXED])
    ]
    mixed = render(requests)
    alone = [render([one])[0] for one in requests]
    for name in BARS:
        assert abs(share(scores(mixed), name) - share(scores(alone), name)) <= 0.01, name
    assert share(scores(mixed), "color") >= 0.9


def run_command(model: str, tmp_path: Path) -> list[str]:
    """Write the first captions as a manifest; return the command that renders it."""
    manifest = tmp_path / "manifest.parquet"
    texts = [text for _, text in ASKED[:NUM_RUN]]
    pq.write_table(pa.table({"prompt": texts, "seed": list(range(NUM_RUN))}), manifest)
    return ["render", str(manifest), "--model", model, "--set", "engine.batch_size=4"]


def assert_run_is_alike(out: Path, model: str) -> None:
    results = read_results(out).sort_by("row_index")
    assert results["status"].to_pylist() == ["completed"] * NUM_RUN
    files = [out / name for name in results["file_name"].to_pylist()]
    assert_alike([np.asarray(Image.open(path)) for path in files], model)


@pytest.mark.parametrize("model", MINIATURES[:1])
def test_a_killed_run_keeps_the_meaning(model: str, tmp_path: Path) -> None:
    command, out = run_command(model, tmp_path), tmp_path / "out"
    driver = subprocess.Popen([sys.executable, "-m", "raydiff", *command, "--out", str(out)])
    wait_for_rows(driver, out, 4, every_s=0.05)
    driver.kill()
    driver.wait(30)
    assert read_results(out).num_rows < NUM_RUN
    cli(*command, "--out", out, cwd=tmp_path)
    assert_run_is_alike(out, model)


@pytest.mark.parametrize("model", MINIATURES[1:])
def test_a_split_run_keeps_the_meaning(model: str, tmp_path: Path) -> None:
    cli(*run_command(model, tmp_path), "--out", "out", "--stages", "split", cwd=tmp_path)
    assert_run_is_alike(tmp_path / "out", model)
