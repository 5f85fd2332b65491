"""Runs with real files and a real ledger, from plain dictionaries: no model is run."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa

from raydiff.config import OutputConfig, RunConfig
from raydiff.output.ledger import Ledger
from raydiff.output.run_file import start_run
from raydiff.output.writer import Writer
from raydiff.request import ManifestRow, RenderRequest, RenderResult, with_request_id

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


def random_pixels(seed: int, height: int = 32, width: int = 48) -> np.ndarray:
    """uint8 (height, width, 3), another image for each seed."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_run(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    *,
    columns: pa.Schema = NO_COLUMNS,
    commit_every: int = 1000,
) -> Path:
    """Write a run of `rows`: request fields over DEFAULTS, values of `columns`, and

    `pixels` (the image; random by the seed if left out), `error` (the row failed), `bad` (it
    made no request).
    """
    config = OutputConfig()
    with start_run(
        folder,
        config=RunConfig(),
        manifest_uri="prompts.parquet",
        manifest_fingerprint="ab" * 16,
        num_rows=len(rows),
        models={"sdxl": "0f1e2d"},
    ) as run:
        writer = Writer(folder, config)
        ledger = Ledger(folder, extra_schema=columns, config=config, lock=run.lock)
        for index, row in enumerate(rows):
            ledger.add(*_ended(row, index, writer, columns))
            if index % commit_every == commit_every - 1:
                ledger.commit()
        ledger.commit()
    return folder


def _ended(
    row: dict[str, Any], index: int, writer: Writer, columns: pa.Schema
) -> tuple[ManifestRow, RenderResult]:
    extra = pa.RecordBatch.from_pylist([{name: row.get(name) for name in columns.names}], columns)
    known = {name: value for name, value in row.items() if name in DEFAULTS}
    request = with_request_id(RenderRequest(**{**DEFAULTS, **known}))
    message = row.get("bad") or row.get("error")
    if message:
        request_id = "" if "bad" in row else request.request_id
        result = RenderResult(request_id=request_id, status="failed", error=message)
    else:
        pixels = row.get("pixels")
        if pixels is None:
            pixels = random_pixels(request.seed, request.height, request.width)
        file = writer.save(request, pixels)
        result = RenderResult(
            request_id=request.request_id,
            status="completed",
            file_name=file.file_name,
            sha256=file.sha256,
            size_bytes=file.size_bytes,
            finished_at=time.time(),
        )
    manifest_row = ManifestRow(
        row_index=index,
        image_index=0,
        request=None if "bad" in row else request,
        error=row.get("bad"),
        extra=extra if len(columns) else None,
    )
    return manifest_row, result


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
