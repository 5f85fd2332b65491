"""A whole run in an object store: killed, continued through faults and an outage, and verified."""

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from raydiff.output.ledger import read_results
from raydiff.output.progress import Progress, read_progress
from raydiff.output.storage import open_storage
from raydiff.output.verify import Verification
from tests.engine.waiting import wait_for_rows
from tests.s3_server import FaultyS3

NUM_ROWS = 160


def rendered(log: Path) -> Counter[str]:
    return Counter(line.split()[0] for line in log.read_text().splitlines())


def test_a_killed_run_is_continued_through_faults_and_an_outage(
    tmp_path: Path,
    s3: FaultyS3,
    write_prompts: Callable[[Sequence[str | None]], Path],
    drive: Callable[..., object],
) -> None:
    storage, log = open_storage(s3.new_uri()), tmp_path / "renders.log"
    local = write_prompts([f"prompt {number}" for number in range(NUM_ROWS)])
    storage.put_file("in/manifest.parquet", local)
    manifest, out = storage.describe("in/manifest.parquet"), storage.describe("out")

    program = str(Path(__file__).with_name("drive.py"))
    driver = subprocess.Popen([sys.executable, program, manifest, out, str(log), "50"])
    wait_for_rows(driver, out, 20, every_s=0.2)
    progress = read_progress(out)
    assert (progress.state, progress.pid) == ("running", driver.pid)
    driver.kill()
    driver.wait(30)
    assert read_progress(out).state == "stopped"
    committed = set(read_results(out)["request_id"].to_pylist())
    assert len(committed) < NUM_ROWS
    before = rendered(log)

    def on_progress(progress: Progress) -> None:
        if progress.done > len(committed) and not s3.outage_until:
            s3.outage_until = time.monotonic() + 3.0

    s3.breaks = lambda method, path: len(s3.requests) % 7 == 0
    s3.faults = ["500", "503", "reset", "reset_after"] * 5
    summary = drive(manifest, out, log, row_ms=1, on_progress=on_progress)
    assert s3.outage_until
    assert not s3.faults
    assert (summary.completed, summary.exit_status) == (NUM_ROWS, 0)  # type: ignore[attr-defined]
    assert read_results(out)["row_index"].to_pylist() == list(range(NUM_ROWS))
    assert not [problem for problem in Verification(out) if problem.is_error]
    assert read_progress(out).state == "finished"
    repeated = {request_id for request_id, count in rendered(log).items() if count > 1}
    assert not repeated & committed
    assert len(repeated) <= sum(before.values()) - len(committed)
