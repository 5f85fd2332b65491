"""Scenes: what is in them fits the canvas, stands where it should, and is drawn as described."""

import math

import numpy as np
import pytest
import torch

from raydiff.mini.captions import caption
from raydiff.mini.draw import draw, table
from raydiff.mini.measure import background_name, find_objects, score
from raydiff.mini.scenes import (
    CANVAS,
    GAP,
    MARGIN,
    Group,
    Placed,
    Scene,
    is_held_out,
    place,
    sample_scene,
)
from raydiff.mini.show import to_uint8
from raydiff.mini.vocabulary import words
from raydiff.tokenizer import CLIPTokenizer, write_tiny_tokenizer

PlacedScene = tuple[Scene, list[Placed]]


@pytest.fixture(scope="module")
def placed_scenes() -> list[PlacedScene]:
    """Return scenes that have found a place for all their objects."""
    rng = np.random.default_rng(3)
    found: list[PlacedScene] = []
    while len(found) < 150:
        scene = sample_scene(rng)
        placed = place(scene, rng)
        if placed is not None:
            found.append((scene, placed))
    return found


def draw_all(placed_scenes: list[PlacedScene]) -> np.ndarray:
    rng = np.random.default_rng(4)
    tables = np.stack([table(scene, placed, rng) for scene, placed in placed_scenes])
    return to_uint8(draw(torch.from_numpy(tables)))


def test_objects_lie_inside_and_apart(placed_scenes: list[PlacedScene]) -> None:
    for scene, placed in placed_scenes:
        assert len(placed) == sum(group.count for group in scene.groups)
        for index, one in enumerate(placed):
            reach = one.radius + MARGIN
            assert reach <= one.x <= CANVAS - reach
            assert reach <= one.y <= CANVAS - reach
            for other in placed[:index]:
                distance = math.hypot(one.x - other.x, one.y - other.y)
                assert distance >= one.radius + other.radius + GAP


def test_groups_stand_as_the_relation_says(placed_scenes: list[PlacedScene]) -> None:
    checked = 0
    for scene, placed in placed_scenes:
        if scene.relation is None:
            continue
        first = [one for one in placed if one.group == 0]
        second = [one for one in placed if one.group == 1]
        axis = "x" if scene.relation in ("left", "right") else "y"
        if scene.relation in ("right", "below"):
            first, second = second, first
        ends = [getattr(one, axis) + one.radius for one in first]
        starts = [getattr(one, axis) - one.radius for one in second]
        assert max(ends) < min(starts)
        checked += 1
    assert checked > 40


def test_drawn_scenes_show_what_they_are(placed_scenes: list[PlacedScene]) -> None:
    pictures = draw_all(placed_scenes)
    for (scene, _), pixels in zip(placed_scenes, pictures, strict=True):
        result = score(scene, pixels)
        assert result.color
        assert result.shape
        assert result.count
        assert result.position in (True, None)
        assert background_name(pixels) == scene.background


def test_a_picture_of_another_scene_is_told_apart(placed_scenes: list[PlacedScene]) -> None:
    pictures = draw_all(placed_scenes)
    others = [scene for scene, _ in placed_scenes[1:]] + [placed_scenes[0][0]]
    results = [score(scene, pixels) for scene, pixels in zip(others, pictures, strict=True)]
    assert np.mean([one.color for one in results]) < 0.2
    assert np.mean([one.count for one in results]) < 0.2
    said = [one.position for one in results if one.position is not None]
    assert np.mean(said) < 0.2


@pytest.mark.parametrize("wrong", ["color", "shape", "count", "position"])
def test_each_measure_sees_its_own_fault(wrong: str) -> None:
    asked = Scene(
        groups=(
            Group(count=1, size="large", color="red", shape="circle"),
            Group(count=1, size="large", color="blue", shape="square"),
        ),
        relation="left",
        background="white",
    )
    groups = list(asked.groups)
    if wrong == "color":
        groups[0] = Group(count=1, size="large", color="green", shape="circle")
    elif wrong == "shape":
        groups[0] = Group(count=1, size="large", color="red", shape="star")
    elif wrong == "count":
        groups[1] = Group(count=2, size="small", color="blue", shape="square")
    shown = Scene(
        groups=tuple(groups),
        relation="right" if wrong == "position" else "left",
        background="white",
    )
    rng = np.random.default_rng(0)
    placed = place(shown, rng)
    assert placed is not None
    result = score(asked, draw_all([(shown, placed)])[0])
    assert getattr(result, wrong) is False
    others = {"color", "shape", "count", "position"} - {wrong}
    # Without the red circle there is nothing to count, to compare or to stand anywhere.
    if wrong != "color":
        assert all(getattr(result, other) for other in others)


def test_noise_and_an_empty_canvas_have_no_objects() -> None:
    rng = np.random.default_rng(0)
    assert find_objects(np.full((CANVAS, CANVAS, 3), 250, np.uint8)) == []
    noise = rng.integers(0, 256, (CANVAS, CANVAS, 3), dtype=np.uint8)
    assert find_objects(noise) == []


def test_scenes_repeat_with_their_seed() -> None:
    first, second = (
        [sample_scene(rng) for _ in range(20)]
        for rng in (np.random.default_rng(5), np.random.default_rng(5))
    )
    assert first == second


def test_one_scene_in_eight_is_held_out_whatever_its_background() -> None:
    rng = np.random.default_rng(6)
    scenes = [sample_scene(rng) for _ in range(4000)]
    assert 0.10 < np.mean([is_held_out(scene) for scene in scenes]) < 0.15
    for scene in scenes[:50]:
        other = Scene(groups=scene.groups, relation=scene.relation, background="black")
        assert is_held_out(scene) == is_held_out(other)


def test_captions_say_all_there_is_unless_left_open() -> None:
    rng = np.random.default_rng(7)
    for _ in range(200):
        scene = sample_scene(rng)
        text = caption(scene, rng, open_share=0.0)
        for group in scene.groups:
            assert group.color in text
            assert group.shape in text
        if scene.background != "white":
            assert scene.background in text
    opened = [caption(sample_scene(rng), rng) for _ in range(500)]
    assert 10 < sum("shape" in text for text in opened) < 100


def test_every_word_of_a_caption_is_one_token(tmp_path) -> None:  # type: ignore[no-untyped-def]
    write_tiny_tokenizer(tmp_path, "!", words())
    tokenizer = CLIPTokenizer.from_folder(tmp_path)
    rng = np.random.default_rng(8)
    texts = [caption(sample_scene(rng), rng) for _ in range(300)]
    encoded = tokenizer.encode(texts)
    for text, ids in zip(texts, encoded.input_ids, strict=True):
        num_words = len(text.replace(",", " , ").split())
        assert (ids != tokenizer.pad_token_id).sum() == num_words + 2  # bos and eos
