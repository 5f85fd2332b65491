"""Animated GIFs through PyAV, frame by frame, each frame with a palette of its own.

One palette for all frames would need the whole clip at once, and flickers less than it bands.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import av
import av.filter

from raydiff.output.clip import Clip, Frame
from raydiff.output.media import metadata_json

MAX_FRAME_RATE = 50
"""A GIF counts in hundredths of a second, and players show a delay of one as ten."""
HEADER_BYTES = 13
HAS_PALETTE = 0x80
COMMENT = b"\x21\xfe"


def encode_gif(path: Path, frames: Iterator[Frame], clip: Clip) -> None:
    """Write the frames of `clip` to `path`; its sound is left out. Raises av.FFmpegError."""
    comment = None if clip.metadata is None else metadata_json(clip.metadata).encode()
    with path.open("wb") as file:
        target = file if comment is None else _WithComment(file, comment)
        with av.open(
            target, "w", format="gif", options={"loop": "0"}, container_options=_BIT_EXACT
        ) as container:
            stream = container.add_stream(
                "gif",
                rate=clip.frame_rate,
                width=clip.width,
                height=clip.height,
                pix_fmt="pal8",
                time_base=1 / clip.frame_rate,
            )
            graph = _palette_graph(clip)
            for index, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = index, 1 / clip.frame_rate
                graph.push(frame)
                _encode_ready(container, stream, graph)
            graph.push(None)
            _encode_ready(container, stream, graph)
            container.mux(stream.encode())


_BIT_EXACT = {"fflags": "+bitexact"}


def _encode_ready(container: Any, stream: Any, graph: Any) -> None:
    """Encode the frames that have their palette by now."""
    with suppress(BlockingIOError, EOFError):
        while True:
            container.mux(stream.encode(graph.pull()))


def _palette_graph(clip: Clip) -> Any:
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=clip.width, height=clip.height, format="rgb24", time_base=1 / clip.frame_rate
    )
    split = graph.add("split")
    palette = graph.add("palettegen", "stats_mode=single")
    use = graph.add("paletteuse", "new=1:dither=sierra2_4a")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(use, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    return graph


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
