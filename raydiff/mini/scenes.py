"""Scenes of coloured shapes: what is in them, and where each object goes on the canvas."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

CANVAS = 128
"""Pixels along a side."""

Shape = Literal["circle", "square", "triangle", "star"]
Color = Literal["red", "green", "blue", "yellow", "purple", "orange"]
Size = Literal["small", "medium", "large"]
Background = Literal["white", "grey", "black"]
Relation = Literal["left", "right", "above", "below"]

SHAPES: tuple[Shape, ...] = ("circle", "square", "triangle", "star")
SIZES: dict[Size, tuple[float, float]] = {
    "small": (11.0, 12.5),
    "medium": (15.5, 17.5),
    "large": (21.0, 24.0),
}
"""Radius of the circle around a shape, in pixels: least and most."""
COLORS: dict[Color, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 82, 214),
    "yellow": (247, 212, 32),
    "purple": (134, 60, 176),
    "orange": (247, 132, 24),
}
BACKGROUNDS: dict[Background, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "grey": (160, 160, 160),
    "black": (16, 16, 16),
}
RELATIONS: tuple[Relation, ...] = ("left", "right", "above", "below")
MAX_COUNT = 3
MAX_OBJECTS = 2 * MAX_COUNT
MARGIN = 3.0
"""Pixels between an object and the border."""
GAP = 5.0
"""Pixels between two objects' circles."""
GROUP_GAP = 4.0
"""Pixels between the bands of two groups."""
MAX_TRIES = 100
HELD_OUT_SHARE = 8
"""One scene in so many is never trained on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Equal objects: `two small red circles`."""

    count: int
    size: Size
    color: Color
    shape: Shape


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One or two groups on a background; `relation` says where the first is from the second."""

    groups: tuple[Group, ...]
    relation: Relation | None
    background: Background


class Placed(NamedTuple):
    """One object: its centre and radius in pixels, and which group it is of."""

    x: float
    y: float
    radius: float
    group: int


class Band(NamedTuple):
    """The part of the canvas that a group may take."""

    left: float
    top: float
    right: float
    bottom: float


WHOLE = Band(0.0, 0.0, CANVAS, CANVAS)


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw what a scene has; groups of one scene have different colours."""
    num_groups = 1 if rng.random() < 0.4 else 2
    colors = rng.permutation(len(COLORS))[:num_groups]
    names = tuple(COLORS)
    groups = tuple(
        Group(
            count=int(rng.integers(1, MAX_COUNT + 1)),
            size=tuple(SIZES)[rng.integers(len(SIZES))],
            color=names[color],
            shape=SHAPES[rng.integers(len(SHAPES))],
        )
        for color in colors
    )
    has_relation = num_groups == 2 and rng.random() < 0.8
    return Scene(
        groups=groups,
        relation=RELATIONS[rng.integers(len(RELATIONS))] if has_relation else None,
        background=tuple(BACKGROUNDS)[rng.choice(len(BACKGROUNDS), p=(0.5, 0.25, 0.25))],
    )


def is_held_out(scene: Scene) -> bool:
    """Tell whether a scene (whatever its background) is kept for measuring."""
    words = [f"{g.count} {g.size} {g.color} {g.shape}" for g in scene.groups]
    text = f" {scene.relation} ".join(words)
    return hashlib.blake2b(text.encode(), digest_size=2).digest()[0] % HELD_OUT_SHARE == 0


def place(scene: Scene, rng: np.random.Generator) -> list[Placed] | None:
    """Find a place for every object, or None where they do not fit."""
    placed: list[Placed] = []
    for index, (group, band) in enumerate(zip(scene.groups, _bands(scene, rng), strict=True)):
        low, high = SIZES[group.size]
        radius = rng.uniform(low, high)
        for _ in range(group.count):
            one = _find_place(band, radius, index, placed, rng)
            if one is None:
                return None
            placed.append(one)
    return placed


def _bands(scene: Scene, rng: np.random.Generator) -> Sequence[Band]:
    """Cut the canvas in two where a relation asks for it, at a random height or width."""
    if scene.relation is None:
        return [WHOLE] * len(scene.groups)
    cut = CANVAS / 2 + _cut_shift(scene, rng)
    near, far = cut - GROUP_GAP / 2, cut + GROUP_GAP / 2
    if scene.relation in ("left", "right"):
        bands = [Band(0, 0, near, CANVAS), Band(far, 0, CANVAS, CANVAS)]
    else:
        bands = [Band(0, 0, CANVAS, near), Band(0, far, CANVAS, CANVAS)]
    return bands if scene.relation in ("left", "above") else bands[::-1]


def _cut_shift(scene: Scene, rng: np.random.Generator) -> float:
    """Give the group that needs more room more of it."""
    areas = [g.count * SIZES[g.size][1] ** 2 for g in scene.groups]
    first = areas[0] if scene.relation in ("left", "above") else areas[1]
    lean = (first / sum(areas) - 0.5) * 40
    return float(np.clip(lean + rng.uniform(-6, 6), -18, 18))


def _find_place(
    band: Band, radius: float, group: int, placed: Sequence[Placed], rng: np.random.Generator
) -> Placed | None:
    reach = radius + MARGIN
    if band.right - band.left < 2 * reach or band.bottom - band.top < 2 * reach:
        return None
    for _ in range(MAX_TRIES):
        x = rng.uniform(band.left + reach, band.right - reach)
        y = rng.uniform(band.top + reach, band.bottom - reach)
        if all(math.hypot(x - o.x, y - o.y) >= radius + o.radius + GAP for o in placed):
            return Placed(x, y, radius, group)
    return None
