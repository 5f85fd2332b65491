"""Captions of scenes, in varied wording, sometimes leaving a colour, a shape or the size open."""

from collections.abc import Sequence

import numpy as np

from raydiff.mini.scenes import Background, Group, Relation, Scene, Size

OPENINGS = ("", "", "", "", "a picture of ", "a drawing of ", "an image of ", "a photo of ")
NUMBERS: dict[int, tuple[str, ...]] = {1: ("a", "one"), 2: ("two", "2"), 3: ("three", "3")}
SIZE_WORDS: dict[Size, tuple[str, ...]] = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("", "", "", "medium"),
    "large": ("large", "large", "big", "huge"),
}
RELATION_WORDS: dict[Relation, tuple[str, ...]] = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
BACKGROUND_WORDS = (
    " on a {} background",
    " on a {} background",
    " on {}",
    " against a {} background",
    ", {} background",
)
OPEN_SHARE = 0.06
"""How often a colour, or a shape, is left open in training."""
UNNAMED_WHITE_SHARE = 0.6
"""How often a white background is not named."""


def caption(scene: Scene, rng: np.random.Generator, *, open_share: float = OPEN_SHARE) -> str:
    """Describe a scene in one of many ways; a colour or a shape is left open so often."""
    groups = [_group(group, rng, open_share) for group in scene.groups]
    if len(groups) == 1:
        body = groups[0]
    elif scene.relation is None:
        first, second = groups if rng.random() < 0.5 else groups[::-1]
        body = f"{first} and {second}"
    else:
        words = RELATION_WORDS[scene.relation]
        body = f"{groups[0]} {pick(words, rng)} {groups[1]}"
    return pick(OPENINGS, rng) + body + _background(scene.background, rng)


def _group(group: Group, rng: np.random.Generator, open_share: float) -> str:
    return _words(
        group,
        pick(NUMBERS[group.count], rng),
        pick(SIZE_WORDS[group.size], rng),
        is_color_open=rng.random() < open_share,
        is_shape_open=rng.random() < open_share,
    )


def _words(
    group: Group,
    number: str,
    size: str,
    *,
    is_color_open: bool,
    is_shape_open: bool,
) -> str:
    shape = "shape" if is_shape_open else group.shape
    words = [size, "" if is_color_open else group.color, shape + ("s" if group.count > 1 else "")]
    text = " ".join(word for word in words if word)
    is_vowel = number == "a" and text[0] in "aeiou"
    return f"{'an' if is_vowel else number} {text}"


def _background(background: Background, rng: np.random.Generator) -> str:
    if background == "white" and rng.random() < UNNAMED_WHITE_SHARE:
        return ""
    return pick(BACKGROUND_WORDS, rng).format(background)


def pick(choices: Sequence[str], rng: np.random.Generator) -> str:
    """Choose a wording."""
    return choices[int(rng.integers(len(choices)))]
