"""status.json: written at most once a second, and believed only while its driver lives."""

import json
import os

import pytest

from raydiff.config import OutputConfig
from raydiff.errors import OutputError
from raydiff.output.ledger import Ledger
from raydiff.output.progress import ProgressFile, read_progress

WORKER = {"worker_id": "w0", "node": "n", "device": "cpu", "done": 3}


def update(file, now, done, *, state="running", total=1000, failed=0):
    return file.update(
        state=state,
        total=total,
        done=done,
        failed=failed,
        quarantined=0,
        duplicates=2,
        workers=[WORKER],
        now=now,
    )


@pytest.fixture
def run_with_rows(begin, make):
    run = begin()
    ledger = Ledger(run.out_dir, extra_schema=make.no_columns, config=OutputConfig(), lock=run.lock)
    for row in range(7):
        request = make.request(row)
        status = "failed" if row == 3 else "completed"
        ledger.add(make.row(request, row), make.result(request, status=status))
    ledger.commit()
    return run


def test_it_says_what_the_driver_said(run_with_rows):
    run = run_with_rows
    file = ProgressFile(run.out_dir, epoch=run.lock.epoch, started_at=1000.0)
    update(file, 1000.0, 100)
    written = update(file, 1010.0, 300, failed=10)
    assert written.rows_per_s == pytest.approx(21.0)
    assert written.eta_s == pytest.approx((1000 - 310) / 21.0)
    assert read_progress(run.out_dir) == written
    assert written.workers == (WORKER,)
    assert (written.pid, written.epoch) == (os.getpid(), 1)


def test_rows_of_earlier_sessions_are_not_this_ones_speed(run_with_rows):
    file = ProgressFile(run_with_rows.out_dir, epoch=1, started_at=0.0)
    assert update(file, 1000.0, 900).rows_per_s is None
    assert update(file, 1010.0, 920).rows_per_s == pytest.approx(2.0)


def test_the_speed_is_that_of_the_last_minute(run_with_rows):
    file = ProgressFile(run_with_rows.out_dir, epoch=1, started_at=0.0)
    for second in range(100):
        update(file, float(second), second * 10)
    for second in range(100, 300):
        last = update(file, float(second), 990 + (second - 99))
    assert last.rows_per_s == pytest.approx(1.0)


def test_no_eta_without_a_total_or_speed(run_with_rows):
    file = ProgressFile(run_with_rows.out_dir, epoch=1, started_at=0.0)
    assert update(file, 1.0, 0).eta_s is None
    assert update(file, 2.0, 0).eta_s is None
    assert update(file, 9.0, 50, total=None).eta_s is None


def test_it_is_written_at_most_once_a_second_and_always_at_the_end(run_with_rows):
    path = run_with_rows.out_dir / "status.json"
    file = ProgressFile(run_with_rows.out_dir, epoch=1, started_at=0.0)
    seen = []
    for tick in range(50):
        update(file, 100 + tick / 20, tick)
        seen.append(json.loads(path.read_text())["done"])
    assert len(set(seen)) == 3
    update(file, 102.46, 50, state="finished")
    assert json.loads(path.read_text())["state"] == "finished"


def test_a_dead_drivers_run_is_stopped_and_counted_from_its_metadata(run_with_rows):
    run = run_with_rows
    update(ProgressFile(run.out_dir, epoch=1, started_at=0.0), 1000.0, 5000)
    assert read_progress(run.out_dir).state == "running"
    run.close()
    progress = read_progress(run.out_dir)
    assert progress.state == "stopped"
    assert (progress.done, progress.failed, progress.total) == (6, 1, 1000)
    assert (progress.rows_per_s, progress.eta_s, progress.workers) == (None, None, ())


@pytest.mark.parametrize("state", ["finished", "interrupted"])
def test_a_run_that_ended_says_how(state, run_with_rows):
    run = run_with_rows
    update(ProgressFile(run.out_dir, epoch=1, started_at=0.0), 1000.0, 99, state=state)
    run.close()
    assert read_progress(run.out_dir).state == state
    assert read_progress(run.out_dir).done == 99


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b'{"state": "odd"}'])
def test_without_a_readable_file_the_metadata_is_counted(content, run_with_rows):
    if content is not None:
        (run_with_rows.out_dir / "status.json").write_bytes(content)
    progress = read_progress(run_with_rows.out_dir)
    assert (progress.state, progress.done, progress.failed) == ("running", 6, 1)
    run_with_rows.close()
    assert read_progress(run_with_rows.out_dir).state == "stopped"


def test_an_earlier_drivers_words_are_not_the_present_ones(run_with_rows, begin):
    update(ProgressFile(run_with_rows.out_dir, epoch=1, started_at=0.0), 1000.0, 5000)
    run_with_rows.close()
    begin()
    progress = read_progress(run_with_rows.out_dir)
    assert progress.done == 6


def test_a_status_that_cannot_be_written_stops_nothing(tmp_path):
    file = ProgressFile(tmp_path / "gone", epoch=1, started_at=0.0)
    assert update(file, 1.0, 5).done == 5


def test_a_folder_that_is_not_a_run_is_named(tmp_path):
    with pytest.raises(OutputError, match="not a run"):
        read_progress(tmp_path)
