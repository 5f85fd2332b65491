"""Clips of one coloured shape that moves: what is in them, and where the shape is when."""

import hashlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from raydiff.mini.scenes import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT_SHARE,
    SHAPES,
    Background,
    Color,
    Shape,
    Size,
)

CANVAS = 64
"""Pixels along a side."""
NUM_FRAMES = 17
FRAME_RATE = 8.0

Direction = Literal["left", "right", "up", "down", "still"]

SIZES: dict[Size, tuple[float, float]] = {
    "small": (8.5, 9.5),
    "medium": (12.0, 13.0),
    "large": (15.5, 17.0),
}
"""Radius of the circle around a shape, in pixels: least and most."""
STEPS: dict[Direction, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "still": (0, 0),
}
"""Where a shape goes, right and down."""
MARGIN = 2.0
"""Pixels between a shape and the border."""
WAYS = (22.0, 30.0)
"""Pixels from a moving shape's first place to its last: least and most, where there is room."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipScene:
    """One shape on a background, and where it goes."""

    size: Size
    color: Color
    shape: Shape
    direction: Direction
    background: Background


class Way(NamedTuple):
    """A shape's middle in the first frame and in the last, and its radius, in pixels."""

    x0: float
    y0: float
    x1: float
    y1: float
    radius: float


def sample_clip_scene(rng: np.random.Generator) -> ClipScene:
    """Draw what a clip has."""
    return ClipScene(
        size=tuple(SIZES)[rng.integers(len(SIZES))],
        color=tuple(COLORS)[rng.integers(len(COLORS))],
        shape=SHAPES[rng.integers(len(SHAPES))],
        direction=tuple(STEPS)[rng.integers(len(STEPS))],
        background=tuple(BACKGROUNDS)[rng.choice(len(BACKGROUNDS), p=(0.5, 0.25, 0.25))],
    )


def is_held_out(scene: ClipScene) -> bool:
    """Tell whether a clip is kept for measuring, whatever its background."""
    text = f"{scene.size} {scene.color} {scene.shape} {scene.direction}"
    return hashlib.blake2b(text.encode(), digest_size=2).digest()[0] % HELD_OUT_SHARE == 0


def sample_way(scene: ClipScene, rng: np.random.Generator) -> Way:
    """Choose where the shape is, so that it stays inside the canvas."""
    radius = rng.uniform(*SIZES[scene.size])
    reach = radius + MARGIN
    room = CANVAS - 2 * reach
    length = min(room, rng.uniform(*WAYS))
    starts = []
    for step in STEPS[scene.direction]:
        start = reach + rng.uniform(0.0, room - length * abs(step))
        starts.append(start + length if step < 0 else start)
    x, y = starts
    right, down = STEPS[scene.direction]
    return Way(x, y, x + right * length, y + down * length, radius)
