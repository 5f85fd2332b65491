"""Small JPEG pictures of a run's images and clips, each made once and named by its request.

One file each, not sheets of many: a filtered or sorted page shows results from everywhere, and
would hold a decoded sheet of 16 MB for each of them. JPEG, since WebP would save a quarter of the
bytes and take 14 times as long.
"""

import io
import os
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from raydiff.output.atomic import disk_error, replace_file
from raydiff.output.frames import IMAGE_FORMATS
from raydiff.output.media_files import (
    MEDIA_COLUMNS,
    MediaError,
    Row,
    is_clip,
    media_name,
    open_media,
)
from raydiff.output.media_store import REQUEST_ID
from raydiff.output.storage import Storage, open_storage
from raydiff.output.video.clip_reader import open_clip

SIZE = 256
QUALITY = 80
THUMBNAILS_DIR = "thumbnails"
FILES_IN_FLIGHT = 64
MediaPlace = tuple[Any, ...]
"""The values of MEDIA_COLUMNS: less memory than a row, of which there may be millions."""
PENDING = ""
"""What stands for a thumbnail that there was no time to make."""

_UNREADABLE = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error),
    Image.DecompressionBombError,
)
"""What Pillow raises for a file that is not what its name says."""


class Thumbnails:
    """The thumbnails of one gallery, in `folder`/thumbnails/ab/<request_id>.jpg."""

    def __init__(self, out_dir: Path, folder: Path) -> None:
        self._out = open_storage(out_dir)
        self._folder = folder / THUMBNAILS_DIR
        self.num_made = 0

    def make(
        self,
        files: Iterable[tuple[str, MediaPlace]],
        *,
        deadline: float | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, str]:
        """Make those of (request_id, place) that are not there, and return what is wrong.

        The result gives the reason by request_id, PENDING for files not looked at by the
        `deadline` (time.monotonic()). Raises DiskError if a thumbnail cannot be written.
        """
        known = self._known()
        wanted = [(one, place) for one, place in files if one not in known]
        problems = dict.fromkeys((one for one, _ in wanted), PENDING)
        for num_seen, (request_id, problem) in enumerate(self._made(wanted, deadline), start=1):
            if problem is None:
                self.num_made += 1
                del problems[request_id]
            else:
                problems[request_id] = problem
            if on_progress is not None:
                on_progress(num_seen, len(wanted))
        return problems

    def _known(self) -> set[str]:
        if not self._folder.is_dir():
            return set()
        return {
            entry.name.removesuffix(".jpg")
            for folder in self._folder.iterdir()
            for entry in os.scandir(folder)
            if entry.name.endswith(".jpg")
        }

    def _made(
        self, wanted: list[tuple[str, MediaPlace]], deadline: float | None
    ) -> Iterator[tuple[str, str | None]]:
        """Yield each request with what is wrong with its file, until the deadline."""
        waiting: deque[tuple[str, Future[str | None]]] = deque()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            try:
                for request_id, place in wanted:
                    if deadline is not None and time.monotonic() > deadline:
                        break
                    waiting.append((request_id, pool.submit(self._make_one, request_id, place)))
                    if len(waiting) >= FILES_IN_FLIGHT:
                        first, future = waiting.popleft()
                        yield first, future.result()
                for one, future in waiting:
                    yield one, future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _make_one(self, request_id: str, place: MediaPlace) -> str | None:
        """Write one thumbnail and return None, or return what is wrong with the file."""
        if not REQUEST_ID.fullmatch(request_id):
            return "its request_id is not one"
        try:
            row = dict(zip(MEDIA_COLUMNS, place, strict=True))
            data = thumbnail(self._out, row)
        except MediaError as error:
            return str(error)
        except UnidentifiedImageError:
            return "the file is not an image"
        except _UNREADABLE as error:
            return f"the file cannot be read: {error}"
        path = self._folder / request_id[:2] / f"{request_id}.jpg"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, data, is_durable=False)
        except OSError as error:
            raise disk_error(path, error) from error
        return None


def thumbnail(out: Storage, row: Row) -> bytes:
    """Return a picture of a row's image or clip as JPEG, at most SIZE pixels wide and high.

    Raises MediaError, or what Pillow raises for a file that is not an image.
    """
    if is_clip(media_name(row)):
        with open_clip(out, row) as clip:
            picture = Image.fromarray(clip.still())
        picture.thumbnail((SIZE, SIZE))
    else:
        with open_media(out, row) as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            image.thumbnail((SIZE, SIZE))  # decodes a JPEG at a fraction of its size
            image.load()
            picture = _opaque(image)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if not image.has_transparency_data:
        return image.convert("RGB")
    over = image.convert("RGBA")
    white = Image.new("RGBA", over.size, "white")
    return Image.alpha_composite(white, over).convert("RGB")
