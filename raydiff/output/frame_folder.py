"""A clip as a folder of PNG files, with an index that says what belongs to it.

The index is written last: with it, the folder is whole.
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

from raydiff.config import OutputConfig
from raydiff.output.clip import Clip, Frame
from raydiff.output.media import encode_image
from raydiff.output.media_files import MediaError
from raydiff.output.media_store import MediaStore
from raydiff.output.storage import Storage, open_storage

INDEX_NAME = "frames.json"


def write_frames(
    store: MediaStore, folder: str, frames: Iterator[Frame], clip: Clip, config: OutputConfig
) -> bytes:
    """Write `folder`/00000.png and so on, and return the index, which is yet to be written.

    Raises DiskError.
    """
    image = config.model_copy(update={"image": "png"})

    def write(index: int, frame: Frame) -> dict[str, Any]:
        data = encode_image(frame, config=image, metadata=None)
        name = f"{index:05d}.png"
        store.put(f"{folder}/{name}", clip.request_id, data)
        digest = hashlib.sha256(data).hexdigest()
        return {"name": name, "size_bytes": len(data), "sha256": digest}

    entries: list[dict[str, Any]] = []
    waiting: deque[Future[dict[str, Any]]] = deque()
    with ThreadPoolExecutor(config.video_threads) as pool:
        try:
            for index, frame in enumerate(frames):
                if len(waiting) > config.video_threads:
                    entries.append(waiting.popleft().result())
                waiting.append(pool.submit(write, index, frame))
            entries.extend(one.result() for one in waiting)
        finally:
            pool.shutdown(cancel_futures=True)
    return _index_bytes(clip, entries)


def read_frames_index(data: bytes) -> dict[str, Any]:
    """Return an index: num_frames, height, width, frame_rate (a fraction), request, files.

    Raises MediaError.
    """
    try:
        index = json.loads(data)
        Fraction(index["frame_rate"])
        is_whole = len(index["files"]) == index["num_frames"]
    except (ValueError, KeyError, TypeError):
        is_whole = False
    if not is_whole:
        raise MediaError("not an index of frames")
    return dict(index)


def check_frames(out: str | Path | Storage, index_name: str) -> None:
    """Read every frame that an index names and compare its hash. Raises MediaError."""
    storage = open_storage(out)
    folder = index_name.rpartition("/")[0]
    try:
        for entry in read_frames_index(storage.read(index_name))["files"]:
            name = f"{folder}/{entry['name']}"
            if hashlib.sha256(storage.read(name)).hexdigest() != entry["sha256"]:
                raise MediaError(f"{name}: not what its index says")
    except FileNotFoundError as error:
        raise MediaError(f"{error.filename}: missing", is_missing=True) from None
    except OSError as error:
        raise MediaError(f"cannot be read: {error.strerror or error}") from None


def _index_bytes(clip: Clip, files: list[dict[str, Any]]) -> bytes:
    index = {
        "num_frames": clip.num_frames,
        "height": clip.height,
        "width": clip.width,
        "frame_rate": str(clip.frame_rate),
        "request": clip.metadata,
        "files": files,
    }
    return json.dumps(index, indent=1).encode() + b"\n"
