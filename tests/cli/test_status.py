"""`raydiff status`, asked while a driver has the run: on this disk and in an object store."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raydiff.config import OutputConfig, RunConfig
from raydiff.output.ledger import Ledger
from raydiff.output.progress import ProgressFile
from raydiff.output.run_file import start_run
from raydiff.request import ManifestRow, RenderResult
from tests.cli.command import cli
from tests.s3_server import FaultyS3

ERRORS = ["CUDA out of memory", "a batch does not fit the GPU", "strange", None, None]
WORKERS = [
    {"worker_id": "w0", "role": "encode", "state": "busy", "node": "a", "rows": 7},
    {"worker_id": "w1", "role": "denoise_decode", "state": "idle", "node": "b", "rows": 0},
]


@contextmanager
def live_run(out: str, *, updated_s_ago: float) -> Iterator[None]:
    """Drive a run, as far as others can see it: lock, ledger and status.json."""
    with start_run(
        out,
        config=RunConfig(),
        manifest_uri="prompts.parquet",
        manifest_fingerprint="ab" * 16,
        num_rows=100,
        models={},
    ) as run:
        ledger = Ledger(out, extra_schema=pa.schema([]), config=OutputConfig(), lock=run.lock)
        for row, error in enumerate(ERRORS):
            result = RenderResult(
                request_id=f"{row:032x}", status="failed" if error else "completed", error=error
            )
            asked = ManifestRow(row_index=row, image_index=0, request=None, error=None, extra=None)
            ledger.add(asked, result)
        ledger.commit()
        now = time.time() - updated_s_ago
        file = ProgressFile(out, epoch=run.lock.epoch, started_at=now - 100)
        file.update(
            state="running",
            total=100,
            done=2,
            failed=3,
            quarantined=0,
            duplicates=0,
            workers=WORKERS,
            queues={"encode_waiting": 12, "denoise_waiting": 0},
            now=now,
        )
        yield


def test_a_live_run_in_an_object_store(s3: FaultyS3, tmp_path: Path) -> None:
    out = s3.new_uri()
    with live_run(out, updated_s_ago=3.0):
        wait_for_status(out)
        text = cli("status", out, cwd=tmp_path).stdout
        values: dict[str, Any] = json.loads(cli("status", out, "--json", cwd=tmp_path).stdout)
    assert text.startswith("running: 5 of 100 rows ended, 2 completed")
    assert " ago\n" in text
    assert "no news" not in text
    assert "without an image: 2 out of memory, 1 other\n" in text
    assert "queues: 12 encode waiting\n" in text
    assert any(line.split() == ["w0", "encode", "busy", "a", "7"] for line in text.splitlines())
    assert (values["state"], values["workers"]) == ("running", WORKERS)


def wait_for_status(out: str) -> None:
    """status.json goes to a store beside the run's own work."""
    from raydiff.output.storage import open_storage

    until = time.monotonic() + 60
    while open_storage(out).size("status.json") is None and time.monotonic() < until:
        time.sleep(0.05)


def test_a_driver_that_says_nothing_more_is_named(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with live_run(out, updated_s_ago=95.0):
        text = cli("status", out, cwd=tmp_path).stdout
    assert text.startswith("running: ")
    assert re.search(r"no news for [1-9] min", text)


@pytest.mark.parametrize("option", [(), ("--watch",)])
def test_a_run_whose_driver_is_gone_is_counted_and_not_waited_for(
    tmp_path: Path, option: tuple[str, ...]
) -> None:
    out = str(tmp_path / "out")
    with live_run(out, updated_s_ago=0.0):
        pass
    text = cli("status", out, *option, cwd=tmp_path).stdout
    assert "stopped: 5 of 100 rows ended, 2 completed" in text
    assert "without an image: 2 out of memory, 1 other" in text
    assert "The same render command continues it." in text
