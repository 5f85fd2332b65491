"""OUT/status.json: how far the run is, written by its driver at most once a second and read by
`raydiff status`, also after the driver is gone."""

import os
import platform
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from raydiff.output.ledger import count_statuses
from raydiff.output.lock import lock_holder
from raydiff.output.run_file import check_is_run
from raydiff.output.storage import Storage, open_storage

STATUS_FILE = "status.json"
INTERVAL_S = 1.0
REMOTE_INTERVAL_S = 5.0
"""In an object store, where each is a request."""
RATE_WINDOW_S = 60.0

State = Literal["running", "finished", "interrupted", "stopped"]


class Progress(BaseModel):
    """How far a run is. Rows are counted once for each of their images; times are Unix seconds."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    state: State
    """`stopped`: its driver is gone without having said so; the same command continues it."""
    total: int | None = None
    """None while rows with several images are still to be read."""
    done: int
    """Rows completed, those of earlier sessions included."""
    failed: int
    quarantined: int
    duplicates: int = 0
    """Rows that took the file of an equal request."""
    rows_per_s: float | None = None
    """Over the last minute of this session."""
    eta_s: float | None = None
    pid: int | None = None
    host: str | None = None
    epoch: int | None = None
    started_at: float | None = None
    updated_at: float | None = None
    workers: tuple[dict[str, Any], ...] = ()
    queues: dict[str, int] = {}
    """What waits where, by queue."""


class ProgressFile:
    """The driver's side of status.json."""

    def __init__(self, out: str | Path | Storage, *, epoch: int, started_at: float) -> None:
        self._storage = open_storage(out)
        is_local = self._storage.local_path("") is not None
        self._interval_s = INTERVAL_S if is_local else REMOTE_INTERVAL_S
        # A store that does not answer must not hold up the run.
        self._thread = None if is_local else ThreadPoolExecutor(1, thread_name_prefix="status")
        self._under_way: Future[None] | None = None
        self._epoch = epoch
        self._started_at = started_at
        self._written_at = float("-inf")
        self._ended: deque[tuple[float, int]] = deque()

    def update(
        self,
        *,
        state: State,
        total: int | None,
        done: int,
        failed: int,
        quarantined: int,
        duplicates: int,
        workers: Sequence[dict[str, Any]],
        now: float,
        queues: Mapping[str, int] | None = None,
    ) -> Progress:
        """Return the progress at Unix time `now`, and write it if the last one is old enough.

        A change away from `running` is always written. A file that cannot be written is left:
        what counts is in the metadata.
        """
        ended = done + failed + quarantined
        rows_per_s = self._rate(ended, now)
        progress = Progress(
            state=state,
            total=total,
            done=done,
            failed=failed,
            quarantined=quarantined,
            duplicates=duplicates,
            rows_per_s=rows_per_s,
            eta_s=(total - ended) / rows_per_s if total is not None and rows_per_s else None,
            pid=os.getpid(),
            host=platform.node(),
            epoch=self._epoch,
            started_at=self._started_at,
            updated_at=now,
            workers=tuple(workers),
            queues=dict(queues or {}),
        )
        if state != "running" or now - self._written_at >= self._interval_s:
            self._written_at = now
            self._write(progress)
        return progress

    def _write(self, progress: Progress) -> None:
        data = progress.model_dump_json().encode()
        if self._thread is None:
            self._put(data)
            return
        is_free = self._under_way is None or self._under_way.done()
        if progress.state != "running":
            self._thread.submit(self._put, data).result()
        elif is_free:
            self._under_way = self._thread.submit(self._put, data)

    def _put(self, data: bytes) -> None:
        with suppress(OSError):
            self._storage.put(STATUS_FILE, data, is_durable=False)

    def _rate(self, ended: int, now: float) -> float | None:
        """Rows per second since the oldest sample of the window; None before there is one."""
        if not self._ended or now - self._ended[-1][0] >= INTERVAL_S:
            self._ended.append((now, ended))
        while len(self._ended) > 1 and now - self._ended[0][0] > RATE_WINDOW_S:
            self._ended.popleft()
        since, before = self._ended[0]
        return (ended - before) / (now - since) if now > since else None


def read_progress(out: str | Path | Storage) -> Progress:
    """Return how far the run in `out` is. Raises OutputError if it is not a run.

    A run whose driver is gone, or that has no readable status.json, is counted from its metadata.
    """
    check_is_run(out)
    progress = _read(open_storage(out))
    is_driven = _is_driven(out, progress)
    if progress is not None and (is_driven or progress.state != "running"):
        return progress
    counts = count_statuses(out)
    counted = {
        "state": "running" if is_driven else "stopped",
        "done": counts["completed"],
        "failed": counts["failed"],
        "quarantined": counts["quarantined"],
    }
    if progress is None:
        return Progress.model_validate(counted)
    return progress.model_copy(update={**counted, "rows_per_s": None, "eta_s": None, "workers": ()})


def _read(storage: Storage) -> Progress | None:
    try:
        return Progress.model_validate_json(storage.read(STATUS_FILE))
    except (OSError, ValidationError):
        return None


def _is_driven(out: str | Path | Storage, progress: Progress | None) -> bool:
    """Tell whether a driver is at work: the lock is held, and by the one that wrote `progress`."""
    holder = lock_holder(out)
    return holder is not None and (progress is None or progress.epoch == holder.epoch)
