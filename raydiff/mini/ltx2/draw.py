"""Clips as pixels and as sound, a whole batch at once.

Sound is a tone for each shape, panned to where the shape is.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raydiff.mini.draw import color_jitter, draw
from raydiff.mini.ltx2.scenes import CANVAS, FRAME_RATE, NUM_FRAMES, ClipScene, Way
from raydiff.mini.scenes import BACKGROUNDS, COLORS, SHAPES, Shape

NUM_FIELDS = 12
"""Of a clip: background, colour, x and y of the first and of the last frame, radius, shape."""
SAMPLE_RATE = 16_000
HOP_LENGTH = 320
"""Samples from one mel frame to the next: 50 a second."""
NUM_MEL_FRAMES = 105
TONES: dict[Shape, float] = {"circle": 400.0, "square": 250.0, "triangle": 600.0, "star": 900.0}
"""Hertz. All are multiples of the 50 mel frames in a second: a vocoder makes the same of the same
mel frame whenever it comes, and only with such a tone does that go on without a break."""
OVERTONE = 0.25
"""Of twice the frequency, beside the tone's 1."""
LOUDNESS = 0.4
FADE_S = 0.08
"""Seconds that the sound takes to begin and to end."""


def table(scene: ClipScene, way: Way, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return a clip as NUM_FIELDS numbers."""
    background = np.add(BACKGROUNDS[scene.background], color_jitter(rng))
    color = np.add(COLORS[scene.color], color_jitter(rng))
    numbers = [*background, *color, *way, SHAPES.index(scene.shape)]
    return np.array(numbers, dtype=np.float32)


def draw_clips(tables: Tensor, num_frames: int = NUM_FRAMES) -> Tensor:
    """(B, NUM_FIELDS) -> the first frames, pixels (B, 3, num_frames, CANVAS, CANVAS) in -1..1."""
    places = _places(tables, torch.arange(num_frames, device=tables.device) / (NUM_FRAMES - 1))
    scenes = torch.full((*places.shape[:2], 2, 7), -1.0, device=tables.device)  # (B, F, 2, 7)
    scenes[:, :, 0, 4:] = tables[:, None, :3]
    scenes[:, :, 1, :2] = places
    scenes[:, :, 1, 2:4] = tables[:, None, 10:]
    scenes[:, :, 1, 4:] = tables[:, None, 3:6]
    pixels = draw(scenes.flatten(0, 1), CANVAS)  # (B * F, 3, H, W)
    return pixels.view(*places.shape[:2], *pixels.shape[1:]).transpose(1, 2)


def on_the_way(tables: Tensor, times: Tensor) -> Tensor:
    """Return clips that begin where these (B, NUM_FIELDS) are at their times (B,), 0..1."""
    moved = tables.clone()
    moved[:, 6:8] = torch.lerp(tables[:, 6:8], tables[:, 8:10], times[:, None])
    return moved


def draw_sounds(tables: Tensor) -> Tensor:
    """(B, NUM_FIELDS) -> samples (B, 2, NUM_MEL_FRAMES * HOP_LENGTH), left and right."""
    num_samples = NUM_MEL_FRAMES * HOP_LENGTH
    seconds = torch.arange(num_samples, dtype=torch.float64, device=tables.device) / SAMPLE_RATE
    tones = torch.tensor([TONES[shape] for shape in SHAPES], dtype=torch.float64)
    hertz = tones.to(tables.device)[tables[:, 11].long()]
    phase = 2 * math.pi * hertz[:, None] * seconds  # (B, N)
    wave = phase.sin() + OVERTONE * (2 * phase).sin()
    ends = torch.minimum(seconds, seconds[-1] - seconds)
    wave = wave * (LOUDNESS / (1 + OVERTONE) * (ends / FADE_S).clamp(max=1))
    last = (NUM_FRAMES - 1) / FRAME_RATE
    x = _places(tables, (seconds / last).clamp(max=1).float())[..., 0]
    pan = x / CANVAS * (math.pi / 2)  # equal power on all the way
    return torch.stack((wave * pan.cos(), wave * pan.sin()), dim=1).float()


def _places(tables: Tensor, times: Tensor) -> Tensor:
    """Where the shapes are at times (T,), 0..1 from the first frame to the last: (B, T, 2)."""
    first, last = tables[:, None, 6:8], tables[:, None, 8:10]
    return first + (last - first) * times[None, :, None]
