"""Init images of img2img: fitted to the request's size, as a tensor in -1..1."""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from raydiff.manifest.init_images import read_init_image


def load_init_image(path: str, height: int, width: int) -> Tensor:
    """Return the image at `path` as (1, 3, height, width) float32 in -1..1.

    Another size keeps its aspect: it is scaled to cover the target (Lanczos) and cropped about
    its centre. Raises RowError when the file is gone or not an intact PNG, JPEG or WebP image.
    """
    rgb = read_init_image(path)
    if rgb.size != (width, height):
        rgb = ImageOps.fit(rgb, (width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(rgb, dtype=np.float32) / 255)  # (H, W, 3)
    return (pixels * 2 - 1).permute(2, 0, 1).unsqueeze(0)
