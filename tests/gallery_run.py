"""Runs to look at: the folder that a render leaves behind, with any rows and files."""

import io
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from raydiff.config import RunConfig
from raydiff.output.metadata_schema import COLUMNS, metadata_schema
from raydiff.output.part_files import part_name, write_part
from raydiff.output.run_file import start_run
from raydiff.output.storage import open_storage

DEFAULTS: dict[str, Any] = {
    "image_index": 0,
    "status": "completed",
    "model": "sdxl",
    "task": "txt2img",
    "seed": 7,
    "height": 64,
    "width": 64,
    "num_inference_steps": 20,
    "guidance_scale": 5.0,
    "guidance_rescale": 0.0,
    "sampler": "euler",
    "model_revision": "0f1e2d",
    "raydiff_version": "0.1.0",
    "size_bytes": 1234,
}


def request_id(number: int) -> str:
    """Return an identity whose digits are spread like a hash's."""
    return f"{number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}"


def write_run(
    out: Path,
    columns: Mapping[str, Sequence[Any]],
    *,
    sequence: int = 1,
    config: RunConfig | None = None,
) -> Path:
    """Write a run whose rows have `columns`, the rest being DEFAULTS; or add rows to it."""
    num_rows = len(columns["row_index"])
    if sequence == 1:
        start_run(
            out,
            config=config or RunConfig(),
            manifest_uri="prompts.parquet",
            manifest_fingerprint="ab" * 16,
            num_rows=num_rows,
            models={"sdxl": "0f1e2d"},
        ).close()
    arrays = {name: pa.array(values) for name, values in columns.items()}
    extra = pa.schema([(name, array.type) for name, array in arrays.items() if name not in COLUMNS])
    if "request_id" not in arrays:
        ids = [request_id(int(row)) for row in columns["row_index"]]
        arrays["request_id"] = pa.array(ids)
        arrays["file_name"] = pa.array([f"images/{one[:2]}/{one}.png" for one in ids])
    for name, value in DEFAULTS.items():
        arrays.setdefault(name, pa.repeat(pa.scalar(value), num_rows))
    fields = {
        field.name: arrays.get(field.name, pa.nulls(num_rows, field.type)).cast(field.type)
        for field in metadata_schema(extra)
    }
    (out / "metadata").mkdir(exist_ok=True)
    write_part(open_storage(out / "metadata"), part_name(1, sequence), iter([pa.table(fields)]))
    return out


def write_rows(
    out: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    sequence: int = 1,
    config: RunConfig | None = None,
) -> Path:
    """Like write_run, with rows as dictionaries; row_index counts up unless it is given."""
    names = dict.fromkeys(
        ["row_index", "request_id", "file_name", *(name for row in rows for name in row)]
    )
    defaults = [{**DEFAULTS, "row_index": index} for index in range(len(rows))]
    for default in defaults:
        one = request_id(default["row_index"])
        default |= {"request_id": one, "file_name": f"images/{one[:2]}/{one}.png"}
    columns = {
        name: [
            row.get(name, default.get(name)) for row, default in zip(rows, defaults, strict=True)
        ]
        for name in names
    }
    return write_run(out, columns, sequence=sequence, config=config)


def put(out: Path, file_name: str, data: bytes) -> None:
    """Write a file of the run."""
    path = out / file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def picture(seed: int, size: int = 64) -> NDArray[np.uint8]:
    """Return soft waves of two colours, uint8 (size, size, 3), others for each seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    wave = np.sin(rng.uniform(2, 7) * x + rng.uniform(2, 7) * y + rng.uniform(0, 6)) / 2 + 0.5
    low, high = rng.uniform(0, 255, (2, 3))
    return (low + wave[..., None] * (high - low)).astype(np.uint8)  # (size, size, 3)


def image_bytes(pixels: NDArray[np.uint8], kind: str = "PNG") -> bytes:
    """Return pixels as the bytes of a file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def video_bytes(seed: int, *, num_frames: int = 24, frame_rate: int = 12) -> bytes:
    """Return a WebM (VP8) of moving waves with a tone (Vorbis or Opus), two seconds long."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="webm") as container:
        video = container.add_stream("libvpx", rate=frame_rate)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("libopus", rate=48_000)
        audio.layout = "mono"
        for index in range(num_frames):
            pixels = np.roll(picture(seed), 2 * index, axis=1)
            for packet in video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        container.mux(video.encode())
        time_s = np.arange(48_000 * num_frames // frame_rate) / 48_000
        tone = (8000 * np.sin(2 * np.pi * 440 * time_s)).astype(np.int16)[None]
        for start in range(0, tone.shape[1], 960):
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(tone[:, start : start + 960]), format="s16", layout="mono"
            )
            frame.sample_rate = 48_000
            frame.pts = start
            frame.time_base = Fraction(1, 48_000)
            container.mux(audio.encode(frame))
        container.mux(audio.encode())
    return buffer.getvalue()
