"""OUT/log/<epoch>.jsonl: what happened in one session of a run, a JSON object a line.

Workers that come and go, failures, warnings, how far the run was each minute, the summary. Rows
that were completed are in the metadata, and not here. Secrets are taken out.
"""

import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raydiff.engine.failures import failure_class
from raydiff.engine.messages import (
    BatchDone,
    Decision,
    DenoiseDone,
    EncodeDone,
    Event,
    FinishRun,
    FlushDone,
    InputsLost,
    StartWorker,
    StopWorker,
    WorkerFailed,
    WorkerHealth,
    WorkerLeaving,
    WorkerPlaced,
    WorkerReady,
)
from raydiff.engine.redact import Redactor
from raydiff.output.progress import Progress
from raydiff.output.storage import Storage
from raydiff.request import RenderResult

LOG_DIR = "log"
PROGRESS_S = 60.0
PUT_S = 30.0
"""Between two writes of a log in an object store, which takes whole files only."""
CLOSE_S = 15.0
"""Longest wait for the last of them."""
THREAD = "run-log"
MAX_FILE_BYTES = 4 * 2**20
MAX_FAILED_ROWS = 10_000
"""Failed rows of a session that are logged; the metadata has all of them."""
MAX_TEXT = 2000


class RunLog:
    """An observer that writes the log of one session.

    A log that cannot be written is given up: what counts is in the metadata.
    """

    def __init__(
        self,
        storage: Storage,
        epoch: int,
        *,
        session: Mapping[str, Any],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`session` is what the first line says of it: versions, host, settings."""
        path = storage.local_path(f"{LOG_DIR}/{epoch}.jsonl")
        self._lines = _LocalLines(path) if path is not None else _StoredLines(storage, epoch)
        self._clock = clock
        self._redact = Redactor()
        self._failed_incarnations: dict[str, int] = {}
        self._num_failed_rows = 0
        self._progress_at = float("-inf")
        self._write("session_started", epoch=epoch, **session)

    def event(self, event: Event, now: float) -> None:
        match event:
            case WorkerPlaced():
                self._write("worker_placed", **_worker(event))
            case WorkerReady(info=info):
                self._write("worker_ready", **_worker(event), **asdict(info))
            case WorkerLeaving(reason=reason):
                self._write("worker_leaving", **_worker(event), reason=reason)
            case WorkerFailed():
                self._worker_failed(event)
            case InputsLost(batch_id=batch_id):
                self._write("inputs_lost", **_worker(event), batch_id=batch_id)
            case EncodeDone(reply=encoded):
                for text, error in enumerate(encoded.errors):
                    if error is not None:
                        self._write("text_failed", **_worker(event), text=text, error=error)
                self._warnings(event, encoded.warnings)
            case BatchDone(reply=reply) | DenoiseDone(reply=reply):
                self._warnings(event, reply.warnings)
        if isinstance(event, BatchDone | FlushDone) and event.reply.disk_error is not None:
            self._write("disk_error", **_worker(event), error=event.reply.disk_error)

    def decision(self, decision: Decision, now: float) -> None:
        match decision:
            case StartWorker(role=role):
                self._write("worker_starting", **_worker(decision), role=role)
            case StopWorker(kind=kind, reason=reason):
                self._write("worker_stopping", **_worker(decision), kind=kind, reason=reason)
            case FinishRun(error=error) if error is not None:
                self._write("run_stopped", error=str(error))

    def ended(self, result: RenderResult, num_rows: int) -> None:
        """Log a request that failed; what was completed is not logged."""
        failure = failure_class(result)
        if failure is None:
            return
        self._num_failed_rows += num_rows
        if self._num_failed_rows <= MAX_FAILED_ROWS:
            self._write(
                "row_failed",
                status=result.status,
                failure=failure,
                request_id=result.request_id,
                rows=num_rows,
                worker_id=result.worker_id,
                error=result.error,
            )

    def health(self, worker_id: str, health: WorkerHealth, now: float) -> None:
        """Log nothing: metrics show what changes all the time."""

    def warning(self, message: str) -> None:
        self._write("warning", message=message)

    def progress(self, progress: Progress, queue_lengths: Mapping[str, int]) -> None:
        """Log once a minute how far the run is."""
        now = self._clock()
        if now - self._progress_at >= PROGRESS_S:
            self._progress_at = now
            self._write(
                "progress",
                total=progress.total,
                completed=progress.done,
                failed=progress.failed,
                quarantined=progress.quarantined,
                rows_per_s=progress.rows_per_s,
                queues=dict(queue_lengths),
            )
        self._lines.flush(now)

    def close(self, summary: Mapping[str, Any]) -> None:
        self._write("session_ended", **summary)
        self.release()

    def release(self) -> None:
        """Let go of the file, also where nobody told how the session ended."""
        self._lines.close()

    def _worker_failed(self, event: WorkerFailed) -> None:
        # Every call that a dead worker had fails, and each says so.
        if self._failed_incarnations.get(event.worker_id) != event.incarnation:
            self._failed_incarnations[event.worker_id] = event.incarnation
            self._write("worker_failed", **_worker(event), cause=event.cause, reason=event.reason)

    def _warnings(self, event: Event, warnings: Sequence[str]) -> None:
        for message in warnings:
            self._write("worker_warning", **_worker(event), message=message)

    def _write(self, name: str, **values: Any) -> None:
        written_at = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds")
        line = {"time": written_at, "event": name, **_clean(values, self._redact)}
        self._lines.add(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


def _worker(message: Any) -> dict[str, Any]:
    return {"worker_id": message.worker_id, "incarnation": message.incarnation}


def _clean(value: Any, redact: Redactor) -> Any:
    """Return what JSON has words for, without secrets."""
    if isinstance(value, Mapping):
        return {str(key): _clean(inner, redact) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(inner, redact) for inner in value]
    if isinstance(value, bool | int) or value is None:
        return value
    if isinstance(value, float):
        # JSON has no infinity: a limit that is off, say.
        return value if math.isfinite(value) else str(value)
    return redact(str(value))[:MAX_TEXT]


class _LocalLines:
    """A file that grows by lines."""

    def __init__(self, path: Path) -> None:
        self._file = None
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)

    def add(self, line: str) -> None:
        if self._file is not None:
            # A full disk stops the run by itself, and says so; a later line may fit again.
            with suppress(OSError):
                self._file.write(line.encode())

    def flush(self, now: float) -> None:
        """Do nothing: each line is in the file at once."""

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class _StoredLines:
    """Files in an object store, written whole and beside the run's loop: <epoch>.jsonl, then
    <epoch>-2.jsonl when that is full, and so on."""

    def __init__(self, storage: Storage, epoch: int) -> None:
        self._storage = storage
        self._epoch = epoch
        self._number = 1
        self._content = bytearray()
        self._num_put = 0
        self._put_at = float("-inf")
        self._thread: threading.Thread | None = None
        self._in_turn = threading.Lock()

    def add(self, line: str) -> None:
        data = line.encode()
        if len(self._content) + len(data) > MAX_FILE_BYTES:
            self._wait()
            self._put()
            self._content.clear()
            self._num_put = 0
            self._number += 1
        self._content += data

    def flush(self, now: float) -> None:
        """Begin to write what is new, if the last write is long ago and over."""
        is_writing = self._thread is not None and self._thread.is_alive()
        if now - self._put_at >= PUT_S and len(self._content) > self._num_put and not is_writing:
            self._put_at = now
            self._put()

    def close(self) -> None:
        self._wait()
        if len(self._content) > self._num_put:
            self._put()
            self._wait()

    def _put(self) -> None:
        suffix = "" if self._number == 1 else f"-{self._number}"
        name = f"{LOG_DIR}/{self._epoch}{suffix}.jsonl"
        self._num_put = len(self._content)
        self._thread = threading.Thread(
            target=self._write_whole, args=(name, bytes(self._content)), name=THREAD, daemon=True
        )
        self._thread.start()

    def _write_whole(self, name: str, data: bytes) -> None:
        # One after the other: an older content must not come last.
        with self._in_turn, suppress(OSError):
            self._storage.put(name, data, is_durable=False)

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join(CLOSE_S)
