"""Image files, named by their request alone, so that a render repeated after a crash lands on
itself and nothing in a prompt can choose a path."""

import hashlib
import time
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raydiff import __version__
from raydiff.config import OutputConfig
from raydiff.output.audio import Audio
from raydiff.output.media import encode_image
from raydiff.output.media_store import IMAGES_DIR, MediaStore, media_path
from raydiff.output.storage import Storage
from raydiff.request import RenderRequest, RenderResult

EMBEDDED_FIELDS = tuple(one.name for one in fields(RenderRequest) if one.name != "init_image")
_embedded_values = attrgetter(*EMBEDDED_FIELDS)


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenFile:
    """A file in place. `file_name` is relative to the output folder, `/` separated."""

    file_name: str
    sha256: str
    size_bytes: int
    write_s: float


class Writer:
    """Encodes and writes images; any number of threads and processes may write at once, the same
    image too."""

    def __init__(self, out: str | Path | Storage, config: OutputConfig) -> None:
        self._store = MediaStore(out, IMAGES_DIR)
        self._config = config

    def write(
        self,
        request: RenderRequest,
        pixels: NDArray[np.uint8],
        result: RenderResult,
        audio: Audio | None = None,
    ) -> list[RenderResult]:
        """Write the image of `request` and return its result, with the file's fields filled in.

        Raises DiskError.
        """
        file = self.save(request, pixels)
        return [
            replace(
                result,
                file_name=file.file_name,
                sha256=file.sha256,
                size_bytes=file.size_bytes,
                write_s=file.write_s,
            )
        ]

    def flush(self) -> list[RenderResult]:
        """Return nothing: a file is in place once it is written."""
        return []

    def save(self, request: RenderRequest, pixels: NDArray[np.uint8]) -> WrittenFile:
        """Write the image of `request`, uint8 (H, W, 3). Raises DiskError."""
        started = time.perf_counter()
        file_name = image_name(request.request_id, self._config)
        metadata = None if self._config.strip_metadata else request_metadata(request)
        data = encode_image(pixels, config=self._config, metadata=metadata)
        self._store.put(file_name, request.request_id, data)
        return WrittenFile(
            file_name=file_name,
            sha256=hashlib.sha256(data).hexdigest(),
            size_bytes=len(data),
            write_s=time.perf_counter() - started,
        )


def image_name(request_id: str, config: OutputConfig) -> str:
    """Return `images/ab/<request_id>.png`. Raises DiskError for anything but 32 hex digits."""
    return f"{media_path(IMAGES_DIR, request_id)}.{config.image}"


def request_metadata(request: RenderRequest) -> dict[str, Any]:
    """Return what an image file says of its request: all but the paths of this machine."""
    values = dict(zip(EMBEDDED_FIELDS, _embedded_values(request), strict=True))
    if request.model_revision.startswith("local-"):
        values["model"] = PurePath(request.model).name
    known = {name: value for name, value in values.items() if value is not None}
    return {**known, "raydiff_version": __version__}
