"""Scores for `raydiff score --with raydiff.score_hooks:NAME`, and examples of what a hook is.

A hook takes the pixels, uint8 (H, W, 3) or a clip's (F, H, W, 3), and the file's metadata row, and
returns a number, a text, a bool, or a dict of those.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

LUMA = np.array([0.299, 0.587, 0.114])
"""ITU-R BT.601."""


def brightness(pixels: NDArray[np.uint8], row: dict[str, Any]) -> float:
    """Return the mean luma, 0 (black) to 255 (white)."""
    return float((pixels @ LUMA).mean())


def sharpness(pixels: NDArray[np.uint8], row: dict[str, Any]) -> float | None:
    """Return the variance of the luma's Laplacian, over all frames: low is blurred or flat; None
    below 3 pixels.

    Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy" (2000).
    """
    if min(pixels.shape[-3:-1]) < 3:
        return None
    luma = pixels @ LUMA  # (..., H, W)
    neighbours = (
        luma[..., :-2, 1:-1] + luma[..., 2:, 1:-1] + luma[..., 1:-1, :-2] + luma[..., 1:-1, 2:]
    )
    return float((neighbours - 4 * luma[..., 1:-1, 1:-1]).var())


def contrast(pixels: NDArray[np.uint8], row: dict[str, Any]) -> dict[str, float]:
    """Return the spread of the luma, `rms`, and the share of pixels that are cut off, `clipped`."""
    luma = pixels @ LUMA
    return {
        "rms": float(luma.std()),
        "clipped": float(((pixels == 0) | (pixels == 255)).all(axis=-1).mean()),
    }
