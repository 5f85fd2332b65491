"""The run loop: rows in, batches to workers, results into the ledger. It alone commits."""

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FrameType
from typing import Any, Self

from raydiff.engine.cluster import LocalCluster
from raydiff.engine.scheduler import (
    Dispatch,
    EndRequest,
    FinishRun,
    Scheduler,
    StartWorker,
    StopWorker,
    WorkerFailed,
    WorkerReady,
)
from raydiff.engine.worker import WorkerInfo
from raydiff.errors import InputError, RaydiffError
from raydiff.output.ledger import Ledger
from raydiff.output.progress import Progress, ProgressFile, State
from raydiff.request import ManifestRow, RenderResult

READ_SLICE_S = 0.05
"""Longest time that rows are read while replies may be waiting."""
POLL_S = 0.2
"""Longest wait for replies: how soon a signal or a due commit is seen."""
PROGRESS_S = 0.25


class Driver:
    """Runs the rows of one manifest to their end, or until it is told to stop."""

    def __init__(
        self,
        *,
        rows: Iterator[ManifestRow],
        total: int | None,
        lookahead: int,
        ledger: Ledger,
        scheduler: Scheduler,
        cluster: LocalCluster,
        progress_file: ProgressFile,
        on_progress: Callable[[Progress], None] | None = None,
        on_warning: Callable[[str], None] | None = None,
    ) -> None:
        """`total` is the number of images, None if that is known only when all rows are read."""
        self._rows = rows
        self._total = total
        self._max_equal_waiting = lookahead
        self._ledger = ledger
        self._scheduler = scheduler
        self._cluster = cluster
        self._progress_file = progress_file
        self._on_progress = on_progress
        self._on_warning = on_warning
        self._waiting: dict[str, list[ManifestRow]] = {}
        """Rows by the request that they wait for; more than one where rows are equal."""
        self._num_equal_waiting = 0
        """Rows beyond the first of each request: the scheduler bounds the number of requests."""
        self._num_read = 0
        self._signals = Signals()
        self._workers: dict[str, WorkerInfo] = {}
        self._rows_by_worker: Counter[str] = Counter()
        self._failed_incarnations: dict[str, int] = {}
        self._reported_at = float("-inf")
        self.num_duplicates = 0
        """Rows that took the file of an equal request."""

    @property
    def is_interrupted(self) -> bool:
        """Whether SIGINT or SIGTERM has asked it to stop."""
        return self._signals.count > 0

    def run(self) -> None:
        """Run to the end. SIGINT or SIGTERM lets the batches in flight end, a second one does not.

        Whatever has ended is committed, also where an error ends the run: EngineError, or the
        InputError that kept the first worker from starting.
        """
        with self._signals:
            error = self._loop()
        self._ledger.commit()
        self._report(_final_state(error, self.is_interrupted))
        if error is not None:
            raise error

    def _loop(self) -> RaydiffError | None:
        """Return the error that ends the run, None where there is none."""
        while self._signals.count < 2:
            if self.is_interrupted:
                self._scheduler.drain()
            is_reading = self._read_rows()
            for decision in self._scheduler.decide(time.monotonic()):
                match decision:
                    case FinishRun():
                        return decision.error
                    case EndRequest():
                        self._end(decision.result)
                    case Dispatch():
                        self._cluster.dispatch(
                            decision.worker_id, decision.incarnation, decision.batch
                        )
                    case StartWorker():
                        self._cluster.start_worker(decision.worker_id, decision.incarnation)
                        self._signals.install()
                    case StopWorker():
                        self._stop(decision)
            for event in self._cluster.poll(0 if is_reading else POLL_S):
                self._note(event)
                self._scheduler.handle(event, time.monotonic())
            if self._ledger.should_commit(time.monotonic()):
                self._ledger.commit()
            if time.monotonic() - self._reported_at >= PROGRESS_S:
                self._report("running")
        return None

    # -- rows ----------------------------------------------------------------------------------

    def _read_rows(self) -> bool:
        """Read rows for a moment; return whether there is room for more at once."""
        until = time.monotonic() + READ_SLICE_S
        while self._scheduler.wants_rows and self._num_equal_waiting < self._max_equal_waiting:
            try:
                row = next(self._rows, None)
            except InputError as error:
                self._scheduler.abort(error)
                return False
            if row is None:
                self._scheduler.close_input()
                self._total = self._total or self._num_read
                return False
            self._num_read += 1
            self._take(row)
            if time.monotonic() >= until:
                return True
        return False

    def _take(self, row: ManifestRow) -> None:
        """Skip a row that has ended, end one that is known, queue the request of any other."""
        if self._ledger.is_done(row.row_index, row.image_index):
            return
        if row.request is None:
            result = RenderResult(
                request_id="", status="failed", error=row.error, finished_at=time.time()
            )
            self._ledger.add(row, result)
            return
        request_id = row.request.request_id
        if request_id in self._waiting:
            self._waiting[request_id].append(row)
            self._num_equal_waiting += 1
        elif known := self._ledger.find(request_id):
            self._ledger.add(row, known)
            self.num_duplicates += 1
        else:
            self._waiting[request_id] = [row]
            self._scheduler.offer(row.request)

    def _end(self, result: RenderResult) -> None:
        if result.finished_at is None:
            result = replace(result, finished_at=time.time())
        rows = self._waiting.pop(result.request_id)
        self._num_equal_waiting -= len(rows) - 1
        self.num_duplicates += len(rows) - 1
        if result.worker_id is not None:
            self._rows_by_worker[result.worker_id] += 1
        for row in rows:
            self._ledger.add(row, result)

    # -- workers -------------------------------------------------------------------------------

    def _stop(self, decision: StopWorker) -> None:
        reason = self._cluster.stop_worker(decision.worker_id)
        event = WorkerFailed(
            worker_id=decision.worker_id,
            incarnation=decision.incarnation,
            cause="start",
            reason=f"worker {decision.worker_id} was stopped: {decision.reason}: {reason}",
        )
        self._note(event)
        self._scheduler.handle(event, time.monotonic())

    def _note(self, event: Any) -> None:
        """Keep what is told to people."""
        if isinstance(event, WorkerReady):
            self._workers[event.worker_id] = event.info
        elif isinstance(event, WorkerFailed):
            self._workers.pop(event.worker_id, None)
            # Every call that a dead worker had fails, and each says so.
            if self._failed_incarnations.get(event.worker_id) == event.incarnation:
                return
            self._failed_incarnations[event.worker_id] = event.incarnation
            if self._on_warning is not None and event.error is None:
                self._on_warning(event.reason)

    def _report(self, state: State) -> None:
        self._reported_at = time.monotonic()
        counts = self._ledger.counts
        progress = self._progress_file.update(
            state=state,
            total=self._total,
            done=counts["completed"],
            failed=counts["failed"],
            quarantined=counts["quarantined"],
            duplicates=self.num_duplicates,
            workers=[self._describe(*worker) for worker in self._scheduler.worker_states.items()],
            now=time.time(),
        )
        if self._on_progress is not None:
            self._on_progress(progress)

    def _describe(self, worker_id: str, state: str) -> dict[str, Any]:
        info = self._workers.get(worker_id)
        return {
            "worker_id": worker_id,
            "state": state,
            "node": info.node if info else None,
            "device": info.device if info else None,
            "pid": info.pid if info else None,
            "rows": self._rows_by_worker[worker_id],
        }


def _final_state(error: RaydiffError | None, is_interrupted: bool) -> State:
    if error is not None:
        return "stopped"
    return "interrupted" if is_interrupted else "finished"


class Signals:
    """Counts SIGINT and SIGTERM while it is entered; the third SIGINT is Python's own again."""

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Take the signals, also back from Ray, whose start replaces them below Python."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, self._handle)
            self._before.setdefault(number, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count > 2 and number == signal.SIGINT:
            raise KeyboardInterrupt
