"""A run's clips read back, frame by frame: videos through PyAV, folders of PNG files through
Pillow."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from raydiff.output.frames import (
    Pixels,
    as_media_errors,
    count_frames,
    opened_video,
    read_frames,
    read_image,
    read_sound,
)
from raydiff.output.media_files import MediaError, is_frames_index, open_media
from raydiff.output.storage import Storage, open_storage
from raydiff.output.video.audio import Audio
from raydiff.output.video.clip_files import frame_rows, sound_name
from raydiff.output.video.wav import read_wav

Row = Mapping[str, Any]
STILL = 3
"""A still is taken from a third of a clip's length: the first frame is black in many."""


class ClipReader(Protocol):
    """One clip; every method raises MediaError, and begins anew."""

    def frames(self) -> Iterator[Pixels]:
        """Yield all frames, uint8 (H, W, 3)."""

    def spread(self, num_frames: int) -> list[Pixels]:
        """Return frames evenly spread from the first to the last, fewer if there are fewer."""

    def still(self) -> Pixels:
        """Return one frame that stands for the clip."""

    def sound(self) -> Audio | None:
        """Return the sound, None for a silent clip."""


@contextmanager
def open_clip(out: str | Path | Storage, row: Row) -> Iterator[ClipReader]:
    """Open the clip of a metadata row. Raises MediaError."""
    if is_frames_index(row["file_name"]):
        yield _FrameFolder(open_storage(out), row)
    else:
        with open_media(out, row) as file:
            yield _VideoFile(file)


class _VideoFile:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def frames(self) -> Iterator[Pixels]:
        return read_frames(self._file)

    def spread(self, num_frames: int) -> list[Pixels]:
        wanted = _spread(count_frames(self._file), num_frames)
        found = [one for index, one in enumerate(self.frames()) if index in wanted]
        if not found:
            raise MediaError("no frame can be decoded")
        return found

    def still(self) -> Pixels:
        """Return the key frame before the place of a still."""
        with as_media_errors(), opened_video(self._file) as container:
            if container.duration:
                container.seek(container.duration // STILL)
            for frame in container.decode(video=0):
                pixels: Pixels = frame.to_ndarray(format="rgb24")
                return pixels
        raise MediaError("no frame can be decoded")

    def sound(self) -> Audio | None:
        return read_sound(self._file)


class _FrameFolder:
    def __init__(self, out: Storage, row: Row) -> None:
        self._out = out
        self._rows = frame_rows(out, row)
        self._wav = sound_name(row["file_name"])

    def frames(self) -> Iterator[Pixels]:
        return map(self._read, self._rows)

    def spread(self, num_frames: int) -> list[Pixels]:
        wanted = _spread(len(self._rows), num_frames)
        return [self._read(self._rows[index]) for index in sorted(wanted)]

    def still(self) -> Pixels:
        return self._read(self._rows[len(self._rows) // STILL])

    def sound(self) -> Audio | None:
        with as_media_errors():
            try:
                data = self._out.read(self._wav)
            except FileNotFoundError:
                return None
        return read_wav(io.BytesIO(data))

    def _read(self, row: Row) -> Pixels:
        try:
            with open_media(self._out, row) as file:
                return np.asarray(read_image(file))
        except MediaError as error:
            raise MediaError(f"{row['name']}: {error}", is_missing=error.is_missing) from None


def _spread(total: int, wanted: int) -> set[int]:
    """Return places among frames; a single one is that of a still."""
    if wanted == 1:
        return {total // STILL}
    return {round((total - 1) * number / (wanted - 1)) for number in range(wanted)}
