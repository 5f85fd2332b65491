"""The run loop: rows in, batches to workers, results into the ledger. It alone commits."""

import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any, Self

from raydiff.engine.make_room import RoomMaker
from raydiff.engine.messages import (
    BatchDone,
    DenoiseDone,
    EncodeDone,
    EndRequest,
    Event,
    FinishRun,
    FlushDone,
    FlushReply,
    Place,
    Role,
    StartWorker,
    WorkerFailed,
    WorkerInfo,
    WorkerLeaving,
    WorkerPlaced,
    WorkerReady,
)
from raydiff.engine.observers import Observers
from raydiff.engine.outage import Outage
from raydiff.engine.scheduler import Scheduler
from raydiff.engine.worker_pool import WorkerPool
from raydiff.errors import DiskError, EngineError, InputError, RaydiffError
from raydiff.output.ledger import Ledger
from raydiff.output.progress import Progress, ProgressFile, State
from raydiff.output.shards.writer import ShardPublisher
from raydiff.request import ManifestRow, RenderResult

READ_SLICE_S = 0.05
"""Longest time that rows are read while replies may be waiting."""
POLL_S = 0.2
"""Longest wait for replies: how soon a signal or a due commit is seen."""
PROGRESS_S = 0.25
REFRESH_S = 5.0
"""Between two looks for new nodes."""
UNPLACED_S = 15.0
"""People are told when a stage has waited so long for its first worker's node."""


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
        pool: WorkerPool,
        progress_file: ProgressFile,
        observers: Observers,
        room: RoomMaker,
        publisher: ShardPublisher | None = None,
        places_now: Callable[[], Sequence[Place]] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        on_warning: Callable[[str], None] | None = None,
    ) -> None:
        """`total` is the number of images, None if that is known only when all rows are read.

        `publisher` is for results in shards. `places_now` says which places the cluster's nodes
        offer, where they come while the run goes on.
        """
        self._rows = rows
        self._total = total
        self._max_equal_waiting = lookahead
        self._ledger = ledger
        self._scheduler = scheduler
        self._pool = pool
        self._progress_file = progress_file
        self._observers = observers
        self._publisher = publisher
        self._room = room
        self._places_now = places_now
        self._places: list[Place] = []
        """As the scheduler was last told."""
        self._offered: list[Place] = []
        """By the nodes, when they were last looked at."""
        self._on_progress = on_progress
        self._on_warning = on_warning
        self._inbox: deque[Event] = deque()
        """Events that are not taken in yet: they wait while the output cannot be written."""
        self._outage = Outage(on_warning=self._warn)
        self._published: dict[str, RenderResult] = {}
        """Results in shards of an earlier session that it could not commit."""
        self._waiting: dict[str, list[ManifestRow]] = {}
        """Rows by the request that they wait for; more than one where rows are equal."""
        self._num_equal_waiting = 0
        """Rows beyond the first of each request: the scheduler bounds the number of requests."""
        self._num_read = 0
        self._signals = Signals()
        self._workers: dict[str, WorkerInfo] = {}
        self._roles: dict[str, Role] = {}
        self._unplaced_since: dict[Role, float] = {}
        """When the first worker was asked for, of stages that have not had one."""
        self._rows_by_worker: Counter[str] = Counter()
        self._failed_incarnations: dict[str, int] = {}
        self._leaving: dict[str, int] = {}
        """Incarnations that are to go with their nodes."""
        self._refreshed_at = self._reported_at = float("-inf")
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
        error: RaydiffError | None
        with self._signals:
            try:
                if self._publisher is not None:
                    self._published = self._publisher.adopt(self._ledger.knows)
                error = self._loop()
            except RaydiffError as raised:
                error = raised
        try:
            self._commit_rest()
            if self._publisher is not None and error is None and not self.is_interrupted:
                self._publisher.finish()
        except EngineError as raised:
            error = error or raised
        self._report(_final_state(error, self.is_interrupted))
        if error is not None:
            raise error

    def _loop(self) -> RaydiffError | None:
        """Return the error that ends the run, None where there is none."""
        while self._signals.count < 2:
            if self.is_interrupted:
                self._scheduler.drain()
            self._write_down()
            is_reading = False
            if not self._outage.is_on:
                is_reading = self._read_rows()
                for decision in self._scheduler.decide(time.monotonic()):
                    self._observers.decision(decision, time.monotonic())
                    if isinstance(decision, FinishRun):
                        return decision.error
                    if isinstance(decision, EndRequest):
                        self._end(decision.result)
                        continue
                    self._pool.carry_out(decision)
                    if isinstance(decision, StartWorker):
                        self._started(decision)
            self._inbox.extend(self._pool.poll(0 if is_reading else POLL_S))
            self._look_around(time.monotonic())
        return None

    def _write_down(self) -> None:
        """Take in what the cluster reported, and commit; or wait, while that cannot be written.

        Raises DiskError when it has been so for too long.
        """
        now = time.monotonic()
        if not self._outage.may_try(now):
            return
        try:
            while self._inbox:
                events = self._publish(self._inbox[0])
                self._inbox.popleft()
                for event in events:
                    self._note(event, now)
                    self._scheduler.handle(event, now)
            if self._ledger.should_commit(now) or self._outage.is_on:
                self._ledger.commit()
        except DiskError as error:
            self._outage.failed(error, time.monotonic())
        else:
            self._outage.succeeded(time.monotonic())

    def _commit_rest(self) -> None:
        """Commit what has ended since the last commit, waiting out an outage. Raises DiskError."""
        while True:
            try:
                self._ledger.commit()
                self._outage.succeeded(time.monotonic())
                return
            except DiskError as error:
                if self._signals.count > 1:
                    raise
                self._outage.failed(error, time.monotonic())
            while not self._outage.may_try(time.monotonic()):
                time.sleep(POLL_S)

    def _publish(self, event: Event) -> Sequence[Event]:
        """Give the shards that a reply tells of their names, and those that a dead worker left:
        what it had rendered comes before its death. Raises DiskError."""
        if self._publisher is None:
            return [event]
        if isinstance(event, BatchDone):
            results = tuple(self._publisher.publish(event.reply.results))
            return [replace(event, reply=replace(event.reply, results=results))]
        if isinstance(event, FlushDone):
            results = tuple(self._publisher.publish(event.reply.results))
            return [replace(event, reply=replace(event.reply, results=results))]
        if isinstance(event, WorkerFailed) and self._is_new_failure(event):
            rescued = self._publisher.rescue(event.worker_id, lambda one: one not in self._waiting)
            flushed = FlushDone(
                worker_id=event.worker_id,
                incarnation=event.incarnation,
                reply=FlushReply(results=tuple(rescued)),
            )
            return [flushed, event] if rescued else [event]
        return [event]

    def _look_around(self, now: float) -> None:
        """Do what is due by the clock."""
        if self._places_now is not None and now - self._refreshed_at >= REFRESH_S:
            self._refreshed_at = now
            offered = list(self._places_now())
            if offered != self._offered:
                self._offered = offered
                self._room.want(offered)
        places = self._room.places(now)
        if places != self._places:
            self._places = places
            self._scheduler.set_places(places)
        for role, since in self._unplaced_since.items():
            if now - since >= UNPLACED_S:
                self._unplaced_since[role] = float("inf")
                self._warn(
                    f"no node has taken a worker of stage {role} yet: {self._pool.unmet(role)}"
                )
        if now - self._reported_at >= PROGRESS_S:
            self._report("running")

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
        elif published := self._published.pop(request_id, None):
            self._ledger.add(row, published)
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
        self._observers.ended(result, len(rows))
        for row in rows:
            self._ledger.add(row, result)

    # -- workers -------------------------------------------------------------------------------

    def _started(self, decision: StartWorker) -> None:
        self._signals.install()
        self._room.started(decision.role, time.monotonic())
        if decision.role not in self._roles.values():
            self._unplaced_since[decision.role] = time.monotonic()
        self._roles[decision.worker_id] = decision.role

    def _note(self, event: Event, now: float) -> None:
        """Keep what is told to people."""
        self._observers.event(event, now)
        match event:
            case WorkerPlaced():
                self._room.placed(event.worker_id, self._roles[event.worker_id])
                self._unplaced_since.pop(self._roles[event.worker_id], None)
            case WorkerReady():
                self._workers[event.worker_id] = event.info
            case WorkerLeaving():
                self._leaving[event.worker_id] = event.incarnation
                self._warn(f"worker {event.worker_id}: {event.reason}")
            case BatchDone() | DenoiseDone() | EncodeDone():
                for warning in event.reply.warnings:
                    self._warn(f"worker {event.worker_id}: {warning}")
            case WorkerFailed():
                self._worker_failed(event)

    def _worker_failed(self, event: WorkerFailed) -> None:
        self._room.gone(event.worker_id)
        self._workers.pop(event.worker_id, None)
        if not self._is_new_failure(event):
            return
        self._failed_incarnations[event.worker_id] = event.incarnation
        is_told = self._leaving.get(event.worker_id) == event.incarnation
        if event.error is None and not (is_told and event.cause == "stopped"):
            self._warn(event.reason)

    def _is_new_failure(self, event: WorkerFailed) -> bool:
        """Every call that a dead worker had fails, and each says so: tell the first."""
        return self._failed_incarnations.get(event.worker_id, -1) < event.incarnation

    def _warn(self, message: str) -> None:
        self._observers.warning(message)
        if self._on_warning is not None:
            self._on_warning(message)

    def _report(self, state: State) -> None:
        self._reported_at = time.monotonic()
        counts = self._ledger.counts
        queues = self._scheduler.queue_lengths
        progress = self._progress_file.update(
            state=state,
            total=self._total,
            done=counts["completed"],
            failed=counts["failed"],
            quarantined=counts["quarantined"],
            duplicates=self.num_duplicates,
            workers=[self._describe(*worker) for worker in self._scheduler.worker_states.items()],
            queues=queues,
            now=time.time(),
        )
        self._observers.progress(progress, queues)
        if self._on_progress is not None:
            self._on_progress(progress)

    def _describe(self, worker_id: str, state: str) -> dict[str, Any]:
        info = self._workers.get(worker_id)
        return {
            "worker_id": worker_id,
            "role": self._roles.get(worker_id),
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
