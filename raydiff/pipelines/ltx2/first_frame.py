"""The first frame of img2vid: as a video encoder would have left it, fitted to the clip's size."""

from io import BytesIO

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from raydiff.manifest.init_images import read_init_image

IMAGE_CRF = 33
"""H.264 quality of the clips that LTX-2.0 and 2.3 learned first frames from (diffusers 0.42.1,
pipelines/ltx2/utils.py): an image without its traces would stand still."""


def read_first_frame(path: str, *, crf: int = IMAGE_CRF) -> Image.Image:
    """Return the image at `path` after H.264 of quality `crf` (0: as it is), at even size.

    Raises RowError when the file is gone or not an intact PNG, JPEG or WebP image.
    """
    image = read_init_image(path)
    if crf == 0:
        return image
    return Image.fromarray(compress(np.asarray(image), crf))


def fit_first_frame(image: Image.Image, height: int, width: int) -> Tensor:
    """Return the image as (1, 3, 1, height, width) float32 in -1..1, one frame.

    Another size keeps its aspect: it is scaled to cover the target and cropped about its centre.
    """
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)  # (H, W, 3)
    return (pixels * 2 - 1).permute(2, 0, 1)[None, :, None]


def compress(pixels: NDArray[np.uint8], crf: int) -> NDArray[np.uint8]:
    """Encode (H, W, 3) as a video of one frame and decode it; an odd last row or column goes."""
    height, width = (size // 2 * 2 for size in pixels.shape[:2])
    if 0 in (height, width):
        return pixels  # One pixel high or wide: the format knows even sizes alone.
    frame = av.VideoFrame.from_ndarray(
        np.ascontiguousarray(pixels[:height, :width]), format="rgb24"
    )
    file = BytesIO()
    with av.open(file, "w", format="mp4") as container:
        options = {"crf": str(crf), "preset": "veryfast"}
        stream = container.add_stream("libx264", rate=1, options=options)
        stream.width, stream.height = width, height
        container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file) as container:
        decoded = next(container.decode(video=0))
        compressed: NDArray[np.uint8] = decoded.to_ndarray(format="rgb24")
    return compressed
