"""A run's files as pixels: images through Pillow, videos frame by frame through PyAV.

Whatever is wrong with a file is a MediaError that says so; a broken file is a finding, not a crash.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from raydiff.errors import OutputError

Pixels = NDArray[np.uint8]

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov")


class MediaError(OutputError):
    """A file of a run is missing, or not what its name says."""

    def __init__(self, message: str, *, is_missing: bool = False) -> None:
        super().__init__(message)
        self.is_missing = is_missing


def media_path(out_dir: Path, file_name: str) -> Path:
    """Return where a file of the metadata lies. Raises MediaError if that is outside `out_dir`."""
    path = out_dir / file_name
    if not path.resolve().is_relative_to(out_dir.resolve()):
        raise MediaError("the file name leads out of the run's folder")
    return path


def is_video(file_name: str) -> bool:
    """Tell a video from an image by its name."""
    return file_name.lower().endswith(VIDEO_SUFFIXES)


def read_image(path: Path, *, max_size: tuple[int, int] | None = None) -> Image.Image:
    """Return an image as RGB; with `max_size`, a JPEG may come reduced to no less than that.

    Raises MediaError, also for a PNG whose checksums do not hold.
    """
    with _as_media_errors():
        try:
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                image.verify()
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                if max_size is not None:
                    image.draft("RGB", max_size)
                return image.convert("RGB")
        except UnidentifiedImageError:
            raise MediaError("not a PNG, JPEG or WebP image") from None
        except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise MediaError(f"{error}") from None


def read_frames(path: Path) -> Iterator[Pixels]:
    """Yield the frames of a video, uint8 (H, W, 3). Raises MediaError."""
    with _as_media_errors(), _opened(path) as container:
        for frame in container.decode(container.streams.video[0]):
            yield frame.to_ndarray(format="rgb24")


def count_frames(path: Path) -> int:
    """Return the number of a video's frames, without decoding them. Raises MediaError."""
    with _as_media_errors(), _opened(path) as container:
        return sum(packet.size > 0 for packet in container.demux(container.streams.video[0]))


def sound_digest(path: Path) -> str | None:
    """Return a hash of a video's decoded sound, None if it is silent. Raises MediaError."""
    with _as_media_errors(), _opened(path) as container:
        if not container.streams.audio:
            return None
        digest = hashlib.sha256()
        for frame in container.decode(container.streams.audio[0]):
            digest.update(frame.to_ndarray().tobytes())
        return digest.hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise MediaError("holds no video")
        yield container


@contextmanager
def _as_media_errors() -> Iterator[None]:
    try:
        yield
    except MediaError:
        raise
    except FileNotFoundError:
        raise MediaError("the file is missing", is_missing=True) from None
    except (OSError, av.FFmpegError) as error:
        raise MediaError(f"cannot be read: {error.strerror or error}") from None
