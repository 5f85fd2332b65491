"""Scenes as pixels: anti-aliased shapes by their signed distances, a whole batch at once."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raydiff.mini.scenes import BACKGROUNDS, CANVAS, COLORS, MAX_OBJECTS, SHAPES, Placed, Scene

NUM_FIELDS = 7
"""Of an object: x, y, radius, shape (-1: there is none), red, green, blue."""
COLOR_JITTER = 7.0
"""Grey levels by which an object's or background's colour may be off."""
STAR_INNER = 0.45
"""Radius of a star's inner corners, as a part of the outer ones'."""


def table(scene: Scene, placed: Sequence[Placed], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return a scene as (1 + MAX_OBJECTS, NUM_FIELDS) numbers; the first row is the background."""
    rows = np.full((1 + MAX_OBJECTS, NUM_FIELDS), -1.0, np.float32)
    rows[0, 4:] = np.add(BACKGROUNDS[scene.background], color_jitter(rng))
    for row, one in zip(rows[1:], placed, strict=False):
        group = scene.groups[one.group]
        color = np.add(COLORS[group.color], color_jitter(rng))
        row[:] = (one.x, one.y, one.radius, SHAPES.index(group.shape), *color)
    return rows


def draw(tables: Tensor, size: int = CANVAS) -> Tensor:
    """(B, 1 + objects, NUM_FIELDS) -> pixels (B, 3, size, size) in -1..1."""
    steps = torch.arange(size, dtype=torch.float32, device=tables.device) + 0.5
    background = tables[:, 0, 4:, None, None]
    image = background.expand(-1, -1, size, size).clone()
    for one in tables[:, 1:].unbind(1):
        x = steps[None, None, :] - one[:, 0, None, None]  # (B, 1, W)
        y = steps[None, :, None] - one[:, 1, None, None]  # (B, H, 1)
        distance = _distance(x, y, one[:, 2, None, None], one[:, 3, None, None])
        cover = (0.5 - distance).clamp(0, 1)[:, None]  # (B, 1, H, W)
        image += cover * (one[:, 4:, None, None] - image)
    return image.clamp(0, 255) / 127.5 - 1


def _distance(x: Tensor, y: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """Signed distance to each row's shape (B, H, W), negative inside; far where there is none."""
    distances = {
        "circle": torch.hypot(x, y) - radius,
        "square": torch.maximum(x.abs(), y.abs()) - 0.8 * radius,
        "triangle": _triangle(x, y, radius),
        "star": _star(x, y, radius),
    }
    result = torch.full_like(distances["circle"], 1e3)
    for index, name in enumerate(SHAPES):
        result = torch.where(shape == index, distances[name], result)
    return result


def _triangle(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Equilateral, its tip up: the largest distance to three sides, lowered to sit in its box."""
    inner = radius / 2
    y = y - radius * 0.12
    slanted = x.abs() * math.cos(math.pi / 6) - y * math.sin(math.pi / 6) - inner
    return torch.maximum(y - inner, slanted)


def _star(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Five points, one up: folded into half a point, then the distance to that point's one side."""
    angle = torch.atan2(x, -y)  # 0 is up
    sector = 2 * math.pi / 5
    folded = (angle - sector * torch.round(angle / sector)).abs()  # 0 .. pi / 5
    length = torch.hypot(x, y)
    along, across = length * folded.cos(), length * folded.sin()
    # The side goes from the tip (radius, 0) to the inner corner at pi / 5.
    inner_along = STAR_INNER * math.cos(math.pi / 5)
    inner_across = STAR_INNER * math.sin(math.pi / 5)
    normal = math.hypot(1 - inner_along, inner_across)
    return ((along - radius) * inner_across + across * (1 - inner_along)) / normal


def color_jitter(rng: np.random.Generator) -> NDArray[np.float64]:
    """Return how far off a colour is in red, green and blue."""
    return rng.uniform(-COLOR_JITTER, COLOR_JITTER, 3)
