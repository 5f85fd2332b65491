"""A clip as a folder of PNG files, with an index that says what belongs to it.

The index is written last: with it, the folder is whole.
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from raydiff.config import OutputConfig
from raydiff.output.media import encode_image
from raydiff.output.media_store import MediaStore
from raydiff.output.video.clip import Clip, Frame


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
