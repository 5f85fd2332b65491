"""A run's files as pixels: images through Pillow, videos frame by frame through PyAV.

Whatever is wrong with a file is a MediaError that says so; a broken file is a finding, not a crash.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from raydiff.output.media_files import MediaError
from raydiff.output.video.audio import Audio

Pixels = NDArray[np.uint8]

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")


def read_image(file: BinaryIO, *, max_size: tuple[int, int] | None = None) -> Image.Image:
    """Return an image as RGB; with `max_size`, a JPEG may come reduced to no less than that.

    Raises MediaError, also for a PNG whose checksums do not hold.
    """
    with as_media_errors():
        try:
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                image.verify()
            file.seek(0)
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                if max_size is not None:
                    image.draft("RGB", max_size)
                return image.convert("RGB")
        except UnidentifiedImageError:
            raise MediaError("not a PNG, JPEG or WebP image") from None
        except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise MediaError(f"{error}") from None


def read_frames(file: BinaryIO) -> Iterator[Pixels]:
    """Yield the frames of a video, uint8 (H, W, 3). Raises MediaError."""
    with as_media_errors(), opened_video(file) as container:
        for frame in container.decode(container.streams.video[0]):
            yield frame.to_ndarray(format="rgb24")


def count_frames(file: BinaryIO) -> int:
    """Return the number of a video's frames, without decoding them. Raises MediaError."""
    with as_media_errors(), opened_video(file) as container:
        return sum(packet.size > 0 for packet in container.demux(container.streams.video[0]))


def read_sound(file: BinaryIO) -> Audio | None:
    """Return a video's decoded sound, None if it is silent. Raises MediaError."""
    with as_media_errors(), opened_video(file) as container:
        if not container.streams.audio:
            return None
        sound = container.streams.audio[0]
        if sound.channels > 2:
            raise MediaError(f"its sound has {sound.channels} channels; 1 or 2 can be read")
        to_floats = av.AudioResampler("fltp", sound.layout, sound.sample_rate)
        decoded = itertools.chain(container.decode(sound), [None])
        parts = [one.to_ndarray() for frame in decoded for one in to_floats.resample(frame)]
        samples = np.concatenate([np.empty((sound.channels, 0), np.float32), *parts], axis=1)
        return Audio(samples=samples, sample_rate=sound.sample_rate)


@contextmanager
def opened_video(file: BinaryIO) -> Iterator[Any]:
    """Open a file that holds a video as PyAV's container. Raises MediaError."""
    file.seek(0)
    with av.open(file) as container:
        if not container.streams.video:
            raise MediaError("holds no video")
        yield container


@contextmanager
def as_media_errors() -> Iterator[None]:
    """Say what is wrong with a file as a MediaError."""
    try:
        yield
    except MediaError:
        raise
    except (OSError, av.FFmpegError) as error:
        raise MediaError(f"cannot be read: {error.strerror or error}") from None
