"""How far apart two images are: largest difference, PSNR, SSIM."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]

WINDOW = 11
SIGMA = 1.5
C1 = (0.01 * 255) ** 2
C2 = (0.03 * 255) ** 2
"""Window and constants of Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from
error visibility to structural similarity" (2004)."""
LUMA = np.array([0.299, 0.587, 0.114])
"""ITU-R BT.601."""
STRIP_ROWS = 32
"""Rows of an SSIM map at a time: the maps of a strip stay in a core's cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Similarity:
    """Of two images, or of two videos: the largest, the mean squared, the mean of the frames."""

    max_abs: int
    """Largest difference of a channel of a pixel, 0..255."""
    psnr: float
    """dB over all channels; infinite where the pixels are equal."""
    ssim: float | None
    """Mean SSIM of the luma, at most 1; None below 11 pixels of height or width."""

    @property
    def is_equal(self) -> bool:
        """Whether every pixel is the same."""
        return self.max_abs == 0


class FrameComparison:
    """Takes in pairs of frames of one size and sums up what they differ by."""

    def __init__(self) -> None:
        self._counts = np.zeros(256, np.int64)
        self._ssim: list[float | None] = []

    def add(self, left: Pixels, right: Pixels) -> None:
        """Compare two frames, uint8 (H, W, 3)."""
        difference = np.maximum(left, right) - np.minimum(left, right)
        counts = np.bincount(difference.ravel(), minlength=256)
        self._counts += counts
        self._ssim.append(mean_ssim(left, right) if counts[1:].any() else 1.0)

    def result(self) -> Similarity:
        """Return the similarity of the frames so far, at least one."""
        levels = np.arange(256)
        mean_squared = float((self._counts * levels**2).sum() / self._counts.sum())
        frames = [one for one in self._ssim if one is not None]
        return Similarity(
            max_abs=int(levels[self._counts > 0].max()),
            psnr=10 * math.log10(255**2 / mean_squared) if mean_squared else math.inf,
            ssim=sum(frames) / len(frames) if frames else None,
        )


def mean_ssim(left: Pixels, right: Pixels) -> float | None:
    """Return the mean SSIM of the luma of two images (H, W, 3), over whole windows only."""
    height, width = (size - WINDOW + 1 for size in left.shape[:2])
    if min(height, width) < 1:
        return None
    total = 0.0
    for top in range(0, height, STRIP_ROWS):
        rows = slice(top, top + STRIP_ROWS + WINDOW - 1)
        total += _ssim_map(left[rows] @ LUMA, right[rows] @ LUMA).sum()
    return float(total / (height * width))


def _ssim_map(x: Floats, y: Floats) -> Floats:
    maps = np.stack([x, y, x * x + y * y, x * y])  # (4, h, w)
    mean_x, mean_y, squares, product = _blur(_blur(maps, axis=1), axis=2)
    mean_squares = mean_x * mean_x + mean_y * mean_y
    mean_product = mean_x * mean_y
    structure = (2 * (product - mean_product) + C2) / (squares - mean_squares + C2)
    luminance = (2 * mean_product + C1) / (mean_squares + C1)
    result: Floats = structure * luminance
    return result


def _blur(maps: Floats, *, axis: int) -> Floats:
    """Weigh each window of WINDOW values along `axis` by a Gaussian; the ends fall away."""
    size = maps.shape[axis] - WINDOW + 1
    half = WINDOW // 2

    def shifted(offset: int) -> Floats:
        index = [slice(None)] * maps.ndim
        index[axis] = slice(half + offset, half + offset + size)
        return maps[tuple(index)]

    total = WEIGHTS[0] * shifted(0)
    for offset in range(1, half + 1):
        total += WEIGHTS[offset] * (shifted(-offset) + shifted(offset))
    return total


def _weights() -> list[float]:
    """Return the Gaussian from its centre to its end; the whole window sums to 1."""
    values = [math.exp(-(x**2) / (2 * SIGMA**2)) for x in range(WINDOW // 2 + 1)]
    total = values[0] + 2 * sum(values[1:])
    return [value / total for value in values]


WEIGHTS = _weights()
