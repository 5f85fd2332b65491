"""Init images of img2img: opened safely, fitted to the request's size, as a tensor in -1..1."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from raydiff.errors import RowError

FORMATS = ("PNG", "JPEG", "WEBP")


def load_init_image(path: str, height: int, width: int) -> Tensor:
    """Return the image at `path` as (1, 3, height, width) float32 in -1..1.

    Another size keeps its aspect: it is scaled to cover the target (Lanczos) and cropped about
    its centre. Raises RowError when the file is gone or not a PNG, JPEG or WebP image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(Path(path), formats=FORMATS) as image:
                rgb = image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError, Warning) as error:
        raise RowError(f"init_image {path}: {error}; it must be a PNG, JPEG or WebP file") from None
    if rgb.size != (width, height):
        rgb = ImageOps.fit(rgb, (width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(rgb, dtype=np.float32) / 255)  # (H, W, 3)
    return (pixels * 2 - 1).permute(2, 0, 1).unsqueeze(0)
