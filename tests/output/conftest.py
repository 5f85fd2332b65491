"""Requests, ended rows and runs with real files, for the tests of the output folder."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raydiff.config import OutputConfig, RunConfig
from raydiff.output.run_file import Run, start_run
from raydiff.output.writer import Writer
from raydiff.request import ManifestRow, RenderRequest, RenderResult, with_request_id


def make_request(seed: int, **changes: Any) -> RenderRequest:
    values = {
        "model": "sdxl",
        "model_revision": "0f1e2d",
        "task": "txt2img",
        "prompt": f"prompt {seed}, 山の写真 🏔 café",
        "negative_prompt": "",
        "seed": seed,
        "height": 16,
        "width": 24,
        "num_inference_steps": 20,
        "guidance_scale": 7.5,
        "guidance_rescale": 0.0,
        "sampler": "euler",
    }
    return with_request_id(RenderRequest(**{**values, **changes}))


def make_result(request: RenderRequest, **changes: Any) -> RenderResult:
    values = {
        "request_id": request.request_id,
        "status": "completed",
        "file_name": f"images/{request.request_id[:2]}/{request.request_id}.png",
        "sha256": request.request_id * 2,
        "size_bytes": 1234,
        "profile": "cpu_only",
        "dtype": "float32",
        "batch_size": 4,
        "worker_id": "w0",
        "encode_s": 0.125,
        "finished_at": 1_700_000_000.25 + request.seed,
    }
    return RenderResult(**{**values, **changes})


def make_row(request: RenderRequest, row_index: int, image_index: int = 0) -> ManifestRow:
    return ManifestRow(
        row_index=row_index, image_index=image_index, request=request, error=None, extra=None
    )


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Start or resume a run in tmp_path/out; every run is closed after the test."""
    runs = []

    def begin_run(**changes: Any) -> Run:
        values = {
            "config": RunConfig(),
            "manifest_uri": "prompts.parquet",
            "manifest_fingerprint": "ab" * 16,
            "num_rows": 100,
            "models": {"sdxl": "0f1e2d"},
        }
        runs.append(start_run(tmp_path / "out", **{**values, **changes}))
        return runs[-1]

    yield begin_run
    for run in runs:
        run.close()


@pytest.fixture
def random_pixels() -> Callable[[int], np.ndarray]:
    """uint8 (16, 24, 3), another image for each seed."""
    return lambda seed: np.random.default_rng(seed).integers(0, 256, (16, 24, 3), dtype=np.uint8)


@pytest.fixture
def render_rows(random_pixels: Callable[[int], np.ndarray]) -> Callable[..., None]:
    """Write the image of each seed and add its row to a ledger."""

    def render(run: Run, ledger: Any, seeds: range) -> None:
        writer = Writer(run.out_dir, OutputConfig())
        for seed in seeds:
            request = make_request(seed)
            file = writer.save(request, random_pixels(seed))
            result = make_result(
                request,
                file_name=file.file_name,
                sha256=file.sha256,
                size_bytes=file.size_bytes,
                finished_at=time.time(),
            )
            ledger.add(make_row(request, seed), result)

    return render


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 kB."""
    with mounted(tmp_path / "small", "size=64k") as folder:
        yield folder


@pytest.fixture
def read_only_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that refuses files, from root too."""
    with mounted(tmp_path / "read-only", "ro,size=64k") as folder:
        yield folder


@pytest.fixture
def make() -> Any:
    """The plain builders above, as attributes."""

    class Builders:
        request = staticmethod(make_request)
        result = staticmethod(make_result)
        row = staticmethod(make_row)
        no_columns = pa.schema([])

    return Builders
