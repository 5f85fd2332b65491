"""A manifest of millions of rows and the ledger of a run that has rendered them, without a render:
columns like a real run's, parts of the sizes that a driver's merges leave."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydiff import __version__
from raydiff.bench.null_model import MODEL
from raydiff.config import RunConfig
from raydiff.manifest.reader import Manifest, open_manifest
from raydiff.output.ledger import FANOUT, FINAL_ROWS, Ledger
from raydiff.output.lock import METADATA_DIR
from raydiff.output.metadata_schema import metadata_schema
from raydiff.output.part_files import part_name, write_part
from raydiff.output.run_file import Run, start_run
from raydiff.output.storage import open_storage

MANIFEST = "manifest.parquet"
OUT = "out"
EXTRA = pa.schema([("source", pa.string()), ("caption_id", pa.int64())])
SUBJECTS = ("a lighthouse at dusk", "a fox in the snow", "a market in the rain", "an old engine")
STYLES = ("oil on canvas", "a photograph, 35 mm", "pencil and ink", "a woodcut in two colours")
SIZES = (768, 1024, 1280)
SECONDS = ("encode_s", "denoise_s", "decode_s", "write_s")
FINISHED_AT_US = 1_700_000_000_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedRun:
    """What was generated."""

    num_parts: int
    ledger_bytes: int
    num_torn: int


def bench_config(folder: Path) -> RunConfig:
    """Return the config of the run in `folder`."""
    return RunConfig.model_validate(
        {
            "manifest": str(folder / MANIFEST),
            "out": str(folder / OUT),
            "model": {"name": MODEL.name},
        }
    )


def open_run(folder: Path, manifest: Manifest) -> Run:
    """Start or resume the run in `folder`."""
    return start_run(
        folder / OUT,
        config=bench_config(folder),
        manifest_uri=manifest.uri,
        manifest_fingerprint=manifest.fingerprint,
        num_rows=manifest.num_rows,
        models={MODEL.name: MODEL.revision},
    )


def generate_run(folder: Path, num_rows: int) -> GeneratedRun:
    """Write the manifest and the ledger, and cut the ledger's last part in half.

    Rows have no seeds: that is what costs a plan most.
    """
    with pq.ParquetWriter(folder / MANIFEST, _manifest_rows(0, 1).schema) as writer:
        for first in range(0, num_rows, FINAL_ROWS):
            writer.write_table(_manifest_rows(first, min(first + FINAL_ROWS, num_rows)))
    with open_run(folder, open_manifest(folder / MANIFEST)) as run:
        # Opened once, it knows this boot of the machine: no file is looked for that is not there.
        Ledger(run.out_dir, extra_schema=EXTRA, config=bench_config(folder).output, lock=run.lock)
        metadata = folder / OUT / METADATA_DIR
        sizes = list(_part_sizes(num_rows))
        first = 0
        for sequence, size in enumerate(sizes, start=1):
            name = part_name(run.lock.epoch, sequence)
            write_part(open_storage(metadata), name, iter([_ledger_rows(first, first + size)]))
            first += size
        torn = (metadata / name).read_bytes()
        (metadata / name).write_bytes(torn[: len(torn) // 2])
    return GeneratedRun(
        num_parts=len(sizes),
        ledger_bytes=sum(path.stat().st_size for path in metadata.iterdir()),
        num_torn=sizes[-1],
    )


def _part_sizes(num_rows: int) -> Iterator[int]:
    """Yield the rows of each part: the large ones first, fewer than FANOUT of each smaller tier."""
    size = FINAL_ROWS
    while num_rows:
        while num_rows >= size:
            yield size
            num_rows -= size
        size //= FANOUT


def _manifest_rows(first: int, end: int) -> pa.Table:
    row = np.arange(first, end)
    numbers = pa.array(row).cast(pa.string())
    prompt = pc.binary_join_element_wise(
        _pick(SUBJECTS, row), numbers, _pick(STYLES, row // 4), ", "
    )
    return pa.table(
        {
            "prompt": prompt,
            "negative_prompt": _pick((None, "blurry", "text, watermark"), row),
            "height": _pick(SIZES, row // 7),
            "width": _pick(SIZES, row // 11),
            "num_inference_steps": _pick((20, 30), row // 3),
            "guidance_scale": _pick((5.0, 7.5, None), row // 5),
            "sampler": _pick(("euler", "ddim"), row // 13),
            "source": _pick(("captions", "templates"), row),
            "caption_id": pa.array(row * 7919 % 10_000_019, pa.int64()),
        }
    )


def _ledger_rows(first: int, end: int) -> pa.Table:
    """Return the metadata of rows that have ended, a little out of order, as workers end them."""
    rng = np.random.default_rng(first)
    num_rows = end - first
    order = pa.array(np.argsort(np.arange(num_rows) + rng.normal(0, 64, num_rows)))
    row = pc.add(order, first)
    asked = _manifest_rows(first, end).take(order)
    request_id = _random_hex(rng, num_rows, 16)
    folder = pc.utf8_slice_codeunits(request_id, 0, 2)
    batch = np.arange(num_rows) // 8
    seconds = {name: pa.array(rng.random(num_rows).round(6)[batch]) for name in SECONDS}
    constants = {
        "image_index": 0,
        "status": "completed",
        "model": MODEL.name,
        "model_revision": MODEL.revision,
        "task": "txt2img",
        "guidance_rescale": 0.0,
        "profile": "full_gpu",
        "dtype": "bfloat16",
        "batch_size": 8,
        "device": "NVIDIA H200",
        "peak_vram_bytes": 20 * 2**30,
        "raydiff_version": __version__,
    }
    values = {
        **{name: asked[name] for name in asked.column_names},
        **{name: pa.repeat(value, num_rows) for name, value in constants.items()},
        **seconds,
        "request_id": request_id,
        "row_index": row,
        "file_name": pc.binary_join_element_wise("images", folder, request_id, "/"),
        "sha256": _random_hex(rng, num_rows, 32),
        "size_bytes": pa.array(rng.integers(1_000_000, 2_000_000, num_rows)),
        "seed": pa.array(rng.integers(0, 2**32, num_rows)),
        "worker_id": _pick([f"w{index}" for index in range(8)], batch),
        "node": _pick(["node-0", "node-1"], batch),
        "finished_at": pa.array(FINISHED_AT_US + np.arange(first, end) * 10_000),
    }
    schema = metadata_schema(EXTRA)
    nulls = pa.nulls(num_rows)
    return pa.table([values.get(name, nulls) for name in schema.names], schema.names).cast(schema)


def _random_hex(rng: np.random.Generator, num_rows: int, num_bytes: int) -> pa.Array:
    """Return random texts of hex digits."""
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    text = digits[rng.integers(0, 16, num_rows * num_bytes * 2, dtype=np.uint8)]
    offsets = np.arange(num_rows + 1, dtype=np.int32) * (num_bytes * 2)
    buffers = [pa.py_buffer(offsets), pa.py_buffer(text)]
    return pa.StringArray.from_buffers(num_rows, *buffers)


def _pick(values: Sequence[Any], index: Any) -> pa.Array:
    return pa.array(values).take(pa.array(index % len(values)))
