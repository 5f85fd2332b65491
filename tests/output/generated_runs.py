"""Runs with real files and a real ledger, from plain dictionaries: no model is run."""

import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import av
import numpy as np
import pyarrow as pa

from raydiff.config import OutputConfig, RunConfig
from raydiff.output.ledger import Ledger
from raydiff.output.run_file import start_run
from raydiff.output.shards.writer import ShardPublisher, ShardWriter
from raydiff.output.writer import Writer
from raydiff.request import ManifestRow, RenderRequest, RenderResult, with_request_id
from tests.clips import clip_audio, clip_pixels, video_settings

DEFAULTS: dict[str, Any] = {
    "model": "sdxl",
    "model_revision": "0f1e2d",
    "task": "txt2img",
    "prompt": "a fox",
    "negative_prompt": None,
    "seed": 0,
    "height": 32,
    "width": 48,
    "num_inference_steps": 20,
    "guidance_scale": 7.5,
    "guidance_rescale": 0.0,
    "sampler": "euler",
}
NO_COLUMNS = pa.schema([])

Out = TypeVar("Out", Path, str)


def random_pixels(seed: int, height: int = 32, width: int = 48) -> np.ndarray:
    """uint8 (height, width, 3), another image for each seed."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def clip_rows(numbers: range) -> list[dict[str, Any]]:
    """Return the rows of clips of 64x64, the last of them without sound."""
    return [
        {
            "seed": number,
            "task": "txt2vid",
            "height": 64,
            "width": 64,
            "prompt": f"clip {number}",
            "video": video_settings(),
            "pixels": clip_pixels(number),
            "audio": None if number == numbers[-1] else clip_audio(),
        }
        for number in numbers
    ]


def write_run(
    folder: Out,
    rows: Sequence[dict[str, Any]],
    *,
    columns: pa.Schema = NO_COLUMNS,
    commit_every: int = 1000,
    format_: Literal["files", "webdataset"] = "files",
    **output: Any,
) -> Out:
    """Write a run of `rows`: request fields over DEFAULTS, values of `columns`, and

    `pixels` (the image, or the clip's frames; random by the seed if left out), `audio` (the clip's
    sound), `error` (the row failed), `bad` (it made no request).
    """
    config = OutputConfig(format=format_, shard_rows=8, **output)
    with start_run(
        folder,
        config=RunConfig(output=config),
        manifest_uri="prompts.parquet",
        manifest_fingerprint="ab" * 16,
        num_rows=len(rows),
        models={"sdxl": "0f1e2d"},
    ) as run:
        writer = Writer(folder, config) if format_ == "files" else ShardWriter(folder, config)
        publisher = ShardPublisher(folder, config)
        ledger = Ledger(folder, extra_schema=columns, config=config, lock=run.lock)
        waiting: dict[str, list[ManifestRow]] = {}

        def end(results: Sequence[RenderResult]) -> None:
            for result in publisher.publish(results):
                for one in waiting.pop(result.request_id):
                    ledger.add(one, result)

        for index, row in enumerate(rows):
            manifest_row = _manifest_row(row, index, columns)
            request = manifest_row.request
            request_id = request.request_id if request else ""
            waiting.setdefault(request_id, []).append(manifest_row)
            result = RenderResult(
                request_id=request_id, status="completed", finished_at=time.time()
            )
            message = row.get("bad") or row.get("error")
            if message or request is None:
                end([replace(result, status="failed", error=message)])
            else:
                pixels = row.get("pixels")
                if pixels is None:
                    pixels = random_pixels(request.seed, request.height, request.width)
                end(writer.write(request, pixels, result, row.get("audio")))
            if index % commit_every == commit_every - 1:
                ledger.commit()
        end(writer.flush())
        ledger.commit()
    return folder


def _manifest_row(row: dict[str, Any], index: int, columns: pa.Schema) -> ManifestRow:
    extra = pa.RecordBatch.from_pylist([{name: row.get(name) for name in columns.names}], columns)
    return ManifestRow(
        row_index=index,
        image_index=0,
        request=None if "bad" in row else request_of(row),
        error=row.get("bad"),
        extra=extra if len(columns) else None,
    )


def request_of(row: dict[str, Any]) -> RenderRequest:
    """Return the request of a row as `write_run` takes it."""
    known = {one.name: row[one.name] for one in fields(RenderRequest) if one.name in row}
    return with_request_id(RenderRequest(**{**DEFAULTS, **known}))


def write_video(path: Path, frames: Sequence[np.ndarray], *, tone_hz: float | None = None) -> None:
    """Write frames (H, W, 3) as a lossless MP4, with a tone as its sound."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264rgb", rate=8, options={"qp": "0"})
        video.height, video.width = frames[0].shape[:2]
        video.pix_fmt = "rgb24"
        audio = container.add_stream("aac", rate=48000) if tone_hz else None
        for pixels in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode())
        if audio is not None:
            seconds = np.arange(48000 * len(frames) // 8) / 48000
            wave = np.sin(2 * np.pi * tone_hz * seconds).astype(np.float32)[None]
            sound = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            sound.sample_rate = 48000
            container.mux(audio.encode(sound))
            container.mux(audio.encode())
