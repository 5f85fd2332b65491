"""Images and clips as files, named by their request alone, so that a render repeated after a crash
lands on itself and nothing in a prompt can choose a path."""

import hashlib
import time
from dataclasses import asdict, fields, replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raydiff import __version__
from raydiff.config import OutputConfig
from raydiff.output.media import encode_image
from raydiff.output.media_store import IMAGES_DIR, MediaStore, WrittenFile, media_path
from raydiff.output.storage import Storage
from raydiff.output.video.audio import Audio
from raydiff.output.video.clip import Clip, exact_rate
from raydiff.request import RenderRequest, RenderResult
from raydiff.video_settings import VideoSettings

if TYPE_CHECKING:
    from raydiff.output.video.writer import VideoWriter

NOT_EMBEDDED = ("init_image", "video")
EMBEDDED_FIELDS = tuple(one.name for one in fields(RenderRequest) if one.name not in NOT_EMBEDDED)
_embedded_values = attrgetter(*EMBEDDED_FIELDS)


class Writer:
    """Encodes and writes images and clips; any number of threads and processes may write at once,
    the same image too."""

    def __init__(
        self, out: str | Path | Storage, config: OutputConfig, *, version: str = __version__
    ) -> None:
        """`version` of raydiff is what the files say they are of."""
        self._out = out
        self._store = MediaStore(out, IMAGES_DIR)
        self._config = config
        self._version = version

    def write(
        self,
        request: RenderRequest,
        pixels: NDArray[np.uint8],
        result: RenderResult,
        audio: Audio | None = None,
    ) -> list[RenderResult]:
        """Write the image or clip of `request` and return its result, with the file's fields
        filled in. Raises what `save` does.
        """
        file = self.save(request, pixels, audio)
        return [replace(result, **{one.name: getattr(file, one.name) for one in fields(file)})]

    def flush(self) -> list[RenderResult]:
        """Return nothing: a file is in place once it is written."""
        return []

    def save(
        self, request: RenderRequest, pixels: NDArray[np.uint8], audio: Audio | None = None
    ) -> WrittenFile:
        """Write the image of `request`, uint8 (H, W, 3), or its clip, uint8 (F, H, W, 3).

        A clip is encoded from where its frames lie. Raises DiskError, and RowError for a clip that
        the file's format cannot hold.
        """
        metadata = request_metadata(request, self._version)
        if request.video is not None:
            return self._videos.save(clip_of(request, request.video, audio, metadata), [pixels])
        started = time.perf_counter()
        file_name = image_name(request.request_id, self._config)
        data = encode_image(pixels, config=self._config, metadata=metadata)
        self._store.put(file_name, request.request_id, data)
        return WrittenFile(
            file_name=file_name,
            sha256=hashlib.sha256(data).hexdigest(),
            size_bytes=len(data),
            write_s=time.perf_counter() - started,
        )

    @cached_property
    def _videos(self) -> "VideoWriter":
        from raydiff.output.video.writer import VideoWriter  # takes what only clips need

        return VideoWriter(self._out, self._config)


def clip_of(
    request: RenderRequest,
    video: VideoSettings,
    audio: Audio | None,
    metadata: dict[str, Any],
) -> Clip:
    """Return the clip that a request asks for, with its sound and what its file is to say."""
    return Clip(
        request_id=request.request_id,
        height=request.height,
        width=request.width,
        num_frames=video.num_frames,
        frame_rate=exact_rate(video.frame_rate),
        audio=audio,
        metadata=metadata,
    )


def image_name(request_id: str, config: OutputConfig) -> str:
    """Return `images/ab/<request_id>.png`. Raises DiskError for anything but 32 hex digits."""
    return f"{media_path(IMAGES_DIR, request_id)}.{config.image}"


def request_metadata(request: RenderRequest, version: str = __version__) -> dict[str, Any]:
    """Return what a file says of its request: all but the paths of this machine."""
    values = dict(zip(EMBEDDED_FIELDS, _embedded_values(request), strict=True))
    if request.video is not None:
        values |= asdict(request.video)
    if request.model_revision.startswith("local-"):
        values["model"] = PurePath(request.model).name
    known = {name: value for name, value in values.items() if value is not None}
    return {**known, "raydiff_version": version}
