"""Training scenes as a picture, to see what the miniatures see."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from raydiff.mini.captions import caption
from raydiff.mini.draw import draw, table
from raydiff.mini.scenes import CANVAS, place, sample_scene

COLUMNS = 8


def draw_scenes(path: str | Path, num_scenes: int, seed: int) -> Iterator[str]:
    """Write `num_scenes` scenes into one image file, and yield a caption of each."""
    rng = np.random.default_rng(seed)
    tables: list[np.ndarray] = []
    texts: list[str] = []
    while len(tables) < num_scenes:
        scene = sample_scene(rng)
        placed = place(scene, rng)
        if placed is not None:
            tables.append(table(scene, placed, rng))
            texts.append(caption(scene, rng))
    pixels = to_uint8(draw(torch.from_numpy(np.stack(tables))))
    num_rows = -(-num_scenes // COLUMNS)
    sheet = np.zeros((num_rows * CANVAS, COLUMNS * CANVAS, 3), np.uint8)
    for index, one in enumerate(pixels):
        top, left = (CANVAS * place for place in divmod(index, COLUMNS))
        sheet[top : top + CANVAS, left : left + CANVAS] = one
    Image.fromarray(sheet).save(path)
    yield from texts


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Turn images (B, 3, H, W) in -1..1 into (B, H, W, 3) bytes."""
    scaled = ((images.clamp(-1, 1) + 1) * 127.5).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
