"""The log of a session: what it holds, what it leaves out, and where it lies."""

import json
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from raydiff.engine import run_log
from raydiff.engine.messages import FinishRun, StopWorker, WorkerFailed, WorkerLeaving
from raydiff.engine.run_log import RunLog
from raydiff.errors import EngineError
from raydiff.output.progress import Progress
from raydiff.output.storage import open_storage
from raydiff.request import RenderResult
from tests.s3_server import FaultyS3


def read(path: Path) -> list[dict[str, Any]]:
    return parse(path.read_bytes())


def parse(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content.splitlines()]


def test_a_session_from_its_first_line_to_its_last(tmp_path: Path) -> None:
    log = RunLog(open_storage(tmp_path), 3, session={"host": "h", "versions": {"ray": "2.60"}})
    import_module("run_story").tell_fused(log)
    log.event(WorkerLeaving(worker_id="w0", incarnation=2, reason="drained"), 20.0)
    stop = StopWorker(worker_id="w0", incarnation=2, kind="drained", reason="its node leaves")
    log.decision(stop, 20.0)
    log.decision(FinishRun(error=EngineError("all workers were lost")), 21.0)
    log.close({"completed": 4, "failed": 2})
    lines = read(tmp_path / "log" / "3.jsonl")
    assert [line["event"] for line in lines] == [
        "session_started",
        "worker_starting",
        "worker_ready",
        "worker_failed",  # once, though two calls failed
        "worker_starting",
        "worker_ready",
        "worker_warning",
        "row_failed",
        "row_failed",
        "warning",
        "progress",
        "worker_leaving",
        "worker_stopping",
        "run_stopped",
        "session_ended",
    ]
    assert lines[0]["epoch"] == 3
    assert lines[0]["versions"] == {"ray": "2.60"}
    by_event = {line["event"]: line for line in lines}
    assert by_event["worker_failed"]["cause"] == "process"
    assert by_event["row_failed"]["failure"] == "bad row"
    assert by_event["progress"]["queues"] == {"rows": 3}
    assert by_event["session_ended"]["completed"] == 4
    assert all(line["time"].endswith("+00:00") for line in lines)


def test_secrets_are_not_in_it_and_long_text_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    log = RunLog(open_storage(tmp_path), 1, session={"config": {"out": "s3://u:wJalrXUtnFEMI@b/x"}})
    reason = "put with wJalrXUtnFEMI failed " + "x" * 10_000
    log.event(WorkerFailed(worker_id="w0", incarnation=1, reason=reason), 0.0)
    log.close({"limit": float("inf")})
    text = (tmp_path / "log" / "1.jsonl").read_text()
    assert "wJalrXUtnFEMI" not in text
    assert "put with *** failed" in text
    assert len(text) < 4000
    assert read(tmp_path / "log" / "1.jsonl")[-1]["limit"] == "inf"


def test_failed_rows_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "MAX_FAILED_ROWS", 5)
    log = RunLog(open_storage(tmp_path), 1, session={})
    for number in range(50):
        log.ended(RenderResult(request_id=f"{number}", status="failed", error="no"), 1)
        log.ended(RenderResult(request_id=f"{number}", status="completed"), 1)
    log.close({})
    assert [line["event"] for line in read(tmp_path / "log" / "1.jsonl")].count("row_failed") == 5


def test_a_folder_that_cannot_be_written_costs_the_log_alone(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("in the way")
    log = RunLog(open_storage(tmp_path), 1, session={})
    import_module("run_story").tell_fused(log)
    log.close({})
    assert (tmp_path / "log").read_text() == "in the way"


def test_in_an_object_store_it_is_written_whole_now_and_then(s3: FaultyS3) -> None:
    storage = open_storage(s3.new_uri())
    now = [1000.0]
    log = RunLog(storage, 2, session={}, clock=lambda: now[0])

    def events() -> list[str]:
        return [line["event"] for line in parse(storage.read("log/2.jsonl"))]

    log.progress(progress(), {})
    until = time.monotonic() + 60
    while storage.size("log/2.jsonl") is None:  # it is written beside the run's loop
        assert time.monotonic() < until
        time.sleep(0.02)
    assert events() == ["session_started", "progress"]
    log.warning("later")
    log.progress(progress(), {})
    assert len(events()) == 2  # not so soon again
    now[0] += run_log.PUT_S
    log.progress(progress(), {})
    log.close({"completed": 1})
    assert events() == ["session_started", "progress", "warning", "session_ended"]


def test_a_long_log_in_an_object_store_goes_on_in_another_file(
    s3: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log, "MAX_FILE_BYTES", 1000)
    storage = open_storage(s3.new_uri())
    log = RunLog(storage, 2, session={})
    for number in range(30):
        log.warning(f"number {number}")
    log.close({})
    files = sorted(storage.list_names("log"), key=lambda name: (len(name), name))
    assert files[:2] == ["2.jsonl", "2-2.jsonl"]
    contents = [storage.read(f"log/{name}") for name in files]
    assert all(len(content) <= 1000 for content in contents)
    lines = [line for content in contents for line in parse(content)]
    warnings = [line["message"] for line in lines if line["event"] == "warning"]
    assert warnings == [f"number {number}" for number in range(30)]


def test_a_store_that_is_away_does_not_hold_the_run_up(
    s3: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log, "CLOSE_S", 0.5)
    storage = open_storage(s3.new_uri())
    s3.outage_until = time.monotonic() + 10
    began = time.monotonic()
    log = RunLog(storage, 1, session={})
    log.progress(progress(), {})
    log.close({})
    assert time.monotonic() - began < 5
    s3.outage_until = 0.0
    for thread in threading.enumerate():
        if thread.name == run_log.THREAD:
            thread.join(60)
    content = parse(storage.read("log/1.jsonl"))
    assert [line["event"] for line in content] == ["session_started", "progress", "session_ended"]


def progress() -> Progress:
    return Progress(state="running", total=9, done=4, failed=2, quarantined=0)
