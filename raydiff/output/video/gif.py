"""Animated GIFs through PyAV, frame by frame, each frame with a palette of its own: one for all
would need the whole clip at once.

Pillow makes the palettes; FFmpeg's palettegen and paletteuse take several times as long.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raydiff.output.media import metadata_json
from raydiff.output.video.clip import Clip, Frame

PALETTE_PIXELS = 24_576
HEADER_BYTES = 13
HAS_PALETTE = 0x80
COMMENT = b"\x21\xfe"


def encode_gif(path: Path, frames: Iterator[Frame], clip: Clip) -> None:
    """Write the frames of `clip` to `path`; its sound is left out. Raises av.FFmpegError."""
    comment = None if clip.metadata is None else metadata_json(clip.metadata).encode()
    with path.open("wb") as file:
        target = file if comment is None else _WithComment(file, comment)
        with av.open(
            target,
            "w",
            format="gif",
            options={"loop": "0"},
            container_options={"fflags": "+bitexact"},
        ) as container:
            stream = container.add_stream(
                "gif",
                rate=clip.frame_rate,
                width=clip.width,
                height=clip.height,
                pix_fmt="pal8",
                time_base=1 / clip.frame_rate,
            )
            for index, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(_with_palette(pixels), format="pal8")
                frame.pts, frame.time_base = index, 1 / clip.frame_rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


def _with_palette(pixels: Frame) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return dithered indices (H, W) and their palette (256, 4), ARGB.

    The palette is of some of the pixels only: of all, it would take most of the time.
    """
    image = Image.fromarray(pixels)
    step = max(1, math.isqrt(image.width * image.height // PALETTE_PIXELS))
    sample = Image.fromarray(np.ascontiguousarray(pixels[::step, ::step]))
    chosen = sample.quantize(256, method=Image.Quantize.MEDIANCUT)
    indices = np.asarray(image.quantize(palette=chosen, dither=Image.Dither.FLOYDSTEINBERG))
    colours = np.array(chosen.getpalette(), np.uint8).reshape(-1, 3)
    palette = np.full((256, 4), 255, np.uint8)
    palette[: len(colours), 1:] = colours
    return indices, palette


class _WithComment:
    """Passes a GIF on to `file` with a comment before its first image, as FFmpeg cannot."""

    def __init__(self, file: BinaryIO, comment: bytes) -> None:
        self._file = file
        self._comment: bytes | None = comment
        self._head = b""

    def write(self, data: bytes) -> int:
        if self._comment is None:
            return self._file.write(data)
        self._head += data
        end = _header_end(self._head)
        if len(self._head) >= end:
            self._file.write(self._head[:end] + _comment_block(self._comment) + self._head[end:])
            self._comment = None
        return len(data)


def _header_end(head: bytes) -> int:
    """Return where the header and the palette after it end."""
    if len(head) < HEADER_BYTES:
        return HEADER_BYTES
    flags = head[10]
    return HEADER_BYTES + (3 << (flags & 7) + 1 if flags & HAS_PALETTE else 0)


def _comment_block(comment: bytes) -> bytes:
    parts = (comment[start : start + 255] for start in range(0, len(comment), 255))
    return COMMENT + b"".join(bytes([len(part)]) + part for part in parts) + b"\0"
