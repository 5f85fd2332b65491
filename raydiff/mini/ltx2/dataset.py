"""Training data: clips as numbers to draw, each with captions and with what they ask for."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raydiff.mini.ltx2.captions import clip_caption
from raydiff.mini.ltx2.draw import table
from raydiff.mini.ltx2.recipe import CAPTIONS_PER_CLIP, DATA_SEED
from raydiff.mini.ltx2.scenes import (
    SIZES,
    STEPS,
    ClipScene,
    is_held_out,
    sample_clip_scene,
    sample_way,
)
from raydiff.mini.scenes import BACKGROUNDS, COLORS, SHAPES

CHOICES = {
    "size": tuple(SIZES),
    "color": tuple(COLORS),
    "shape": SHAPES,
    "direction": tuple(STEPS),
    "background": tuple(BACKGROUNDS),
}
"""What each word of a scene can be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipDataset:
    """Clips to train on; none is held out."""

    tables: Tensor
    """(N, fields) for `draw_clips` and `draw_sounds`."""
    labels: Tensor
    """(N, len(CHOICES)) int64: which of its choices each word is."""
    captions: list[str]
    """N * CAPTIONS_PER_CLIP, those of a clip in a row."""

    def first(self, num_clips: int) -> "ClipDataset":
        """Return the first clips, all if there are fewer."""
        return ClipDataset(
            tables=self.tables[:num_clips],
            labels=self.labels[:num_clips],
            captions=self.captions[: num_clips * CAPTIONS_PER_CLIP],
        )


def make_clips(num_clips: int) -> ClipDataset:
    """Make the first `num_clips` clips."""
    rng = np.random.default_rng(DATA_SEED)
    tables: list[NDArray[np.float32]] = []
    labels: list[list[int]] = []
    captions: list[str] = []
    while len(tables) < num_clips:
        scene = sample_clip_scene(rng)
        if is_held_out(scene):
            continue
        tables.append(table(scene, sample_way(scene, rng), rng))
        labels.append(_labels(scene))
        captions += [clip_caption(scene, rng) for _ in range(CAPTIONS_PER_CLIP)]
    return ClipDataset(
        tables=torch.from_numpy(np.stack(tables)), labels=torch.tensor(labels), captions=captions
    )


def _labels(scene: ClipScene) -> list[int]:
    return [choices.index(getattr(scene, name)) for name, choices in CHOICES.items()]
