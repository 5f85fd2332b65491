"""Does a picture show what its caption says? Plain image analysis: areas of one palette colour,
each compared with the outlines of the known shapes."""

from collections import Counter, deque
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from raydiff.mini.draw import draw
from raydiff.mini.scenes import BACKGROUNDS, CANVAS, COLORS, SHAPES, Color, Scene, Shape

BORDER = 2
"""Pixels along the border whose median is the background."""
COLOR_TOLERANCE = 80.0
"""Distance in RGB up to which a pixel is of a palette colour: edges are mixtures, and of none."""
MIN_AREA = 50
MIN_CORE = 9
"""Pixels of an object that have all eight neighbours: a thin rim has none."""
OUTLINE_SIZE = 32
NEIGHBOURS = ((-1, 0), (1, 0), (0, -1), (0, 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """An object in a picture: its colour, likeliest shape, centre and area in pixels."""

    color: Color
    shape: Shape
    x: float
    y: float
    area: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Whether a picture has what a scene asks for, all of its groups together."""

    color: bool
    """The colours of the picture are those asked for, none missing and none more."""
    shape: bool
    """Every object has the shape that its colour asks for."""
    count: bool
    """There are as many objects of each colour as asked for."""
    position: bool | None
    """The groups stand as asked; None where the scene does not say."""

    @property
    def is_right(self) -> bool:
        """Whether nothing of it is wrong."""
        return self.color and self.shape and self.count and self.position is not False


def find_objects(pixels: NDArray[np.uint8]) -> list[Found]:
    """Find the objects of a picture (H, W, 3)."""
    labels = _color_labels(pixels)
    found = []
    for mask in _areas(labels):
        rows, columns = np.nonzero(mask)
        if len(rows) < MIN_AREA or _num_core(mask) < MIN_CORE:
            continue
        found.append(
            Found(
                color=tuple(COLORS)[labels[rows[0], columns[0]]],
                shape=_shape(mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]),
                x=float(columns.mean()),
                y=float(rows.mean()),
                area=len(rows),
            )
        )
    return found


def score(scene: Scene, pixels: NDArray[np.uint8]) -> Score:
    """Compare a picture (H, W, 3) with a scene."""
    found = find_objects(pixels)
    counts = Counter(one.color for one in found)
    asked = {group.color: group for group in scene.groups}
    return Score(
        color=counts.keys() == asked.keys(),
        shape=bool(found)
        and all(one.color in asked and one.shape == asked[one.color].shape for one in found),
        count=all(counts[group.color] == group.count for group in scene.groups),
        position=_position(scene, found),
    )


def _position(scene: Scene, found: list[Found]) -> bool | None:
    """Compare the groups' middles; the larger of the two distances must be the one asked for."""
    if scene.relation is None:
        return None
    middles = []
    for group in scene.groups:
        places = [(one.x, one.y) for one in found if one.color == group.color]
        if not places:
            return False
        middles.append(np.mean(places, axis=0))
    right, down = middles[0] - middles[1]
    if scene.relation in ("left", "right"):
        return bool(abs(right) > abs(down) and (right < 0) == (scene.relation == "left"))
    return bool(abs(down) > abs(right) and (down < 0) == (scene.relation == "above"))


def _color_labels(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the palette index of each pixel (H, W), -1 where it is background or a mixture."""
    values = pixels.astype(np.float32)
    palette = np.array(list(COLORS.values()), np.float32)
    distances = np.linalg.norm(values[:, :, None] - palette, axis=-1)  # (H, W, colours)
    labels: NDArray[np.int64] = distances.argmin(axis=-1)
    nearest = distances.min(axis=-1)
    is_background = np.linalg.norm(values - _background(values), axis=-1) < nearest
    labels[is_background | (nearest > COLOR_TOLERANCE)] = -1
    return labels


def _background(values: NDArray[np.float32]) -> NDArray[np.float32]:
    rim = np.ones(values.shape[:2], dtype=bool)
    rim[BORDER:-BORDER, BORDER:-BORDER] = False
    middle: NDArray[np.float32] = np.median(values[rim], axis=0)
    return middle


def background_name(pixels: NDArray[np.uint8]) -> str:
    """Return the known background nearest to a picture's (H, W, 3)."""
    middle = _background(pixels.astype(np.float32))
    return min(BACKGROUNDS, key=lambda name: float(np.linalg.norm(middle - BACKGROUNDS[name])))


def _areas(labels: NDArray[np.int64]) -> list[NDArray[np.bool_]]:
    """Return the connected areas of one label each, -1 left out."""
    height, width = labels.shape
    is_seen = labels < 0
    areas = []
    for start in zip(*np.nonzero(~is_seen), strict=True):
        if is_seen[start]:
            continue
        mask = np.zeros(labels.shape, dtype=bool)
        waiting = deque([start])
        is_seen[start] = True
        while waiting:
            row, column = waiting.popleft()
            mask[row, column] = True
            for down, right in NEIGHBOURS:
                near = (row + down, column + right)
                if not (0 <= near[0] < height and 0 <= near[1] < width) or is_seen[near]:
                    continue
                if labels[near] == labels[start]:
                    is_seen[near] = True
                    waiting.append(near)
        areas.append(mask)
    return areas


def _num_core(mask: NDArray[np.bool_]) -> int:
    padded = np.pad(mask, 1)
    core = np.ones(mask.shape, dtype=bool)
    for row in range(3):
        for column in range(3):
            core &= padded[row : row + mask.shape[0], column : column + mask.shape[1]]
    return int(core.sum())


def _shape(mask: NDArray[np.bool_]) -> Shape:
    """Return the shape whose outline in the same box covers `mask` best."""
    crop = _resized(mask)
    overlaps = {
        shape: (crop & outline).sum() / (crop | outline).sum()
        for shape, outline in _outlines().items()
    }
    return max(overlaps, key=lambda shape: overlaps[shape])


def _resized(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    rows, columns = (
        ((np.arange(OUTLINE_SIZE) + 0.5) * size / OUTLINE_SIZE).astype(int) for size in mask.shape
    )
    resized: NDArray[np.bool_] = mask[rows][:, columns]
    return resized


@cache
def _outlines() -> dict[Shape, NDArray[np.bool_]]:
    """Draw each shape once, cut to its box."""
    outlines = {}
    for index, shape in enumerate(SHAPES):
        table = torch.full((1, 2, 7), -1.0)
        table[0, 0, 4:] = 0.0
        table[0, 1] = torch.tensor([CANVAS / 2, CANVAS / 2, 50.0, index, 255.0, 255.0, 255.0])
        mask = draw(table)[0, 0].numpy() > 0
        rows, columns = np.nonzero(mask)
        outlines[shape] = _resized(
            mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        )
    return outlines
