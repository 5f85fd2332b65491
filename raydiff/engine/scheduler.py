"""Who renders what, and what happens when a worker dies. Pure: no Ray, no clock, no I/O.

Events come in through `handle`, `offer`, `close_input`, `drain`; `decide(now)` says what to do.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from raydiff.batching import Batcher, BatchKey
from raydiff.config import EngineConfig
from raydiff.engine.messages import (
    BatchDone,
    BatchReply,
    Decision,
    Dispatch,
    EndRequest,
    Event,
    FinishRun,
    Place,
    StartWorker,
    StopWorker,
    WorkerFailed,
    WorkerPlaced,
    WorkerReady,
)
from raydiff.errors import DiskError, EngineError, RaydiffError
from raydiff.request import RenderBatch, RenderRequest, RenderResult

FIRST_BATCH_SIZE = 8
"""Rows of a worker's first batch of a shape, which it may split: its reply says how many fit."""
MAX_START_FAILURES = 3
"""Starts in a row that may fail before a worker's place is given up."""
MIN_CRASHES_ALONE = 2
"""Crashes that a single row must have caused with nothing beside it, to be quarantined."""
MAX_CRASHES_WITHOUT_RESULT = 10
"""Crashes in a row, with no image in between, that end the run: then it is not the rows' fault."""


@dataclass(eq=False, kw_only=True, slots=True)
class _InFlight:
    """A batch that a worker holds, or that waits to be retried."""

    batch: RenderBatch
    num_crashes: int = 0
    """Workers that died with this batch as the suspect."""
    num_crashes_alone: int = 0
    """Those of them that held nothing else."""
    is_alone: bool = False
    """Sent to an idle worker that gets nothing else meanwhile, so that blame is certain."""


@dataclass(kw_only=True, slots=True)
class _Slot:
    """A place for one worker, and the process that has it now."""

    place: Place
    state: Literal["empty", "starting", "ready", "lost"] = "empty"
    incarnation: int = 0
    deadline: float = 0.0
    num_start_failures: int = 0
    model: str | None = None
    """Of the last batch: resident in the worker."""
    batch_sizes: dict[BatchKey, int] = field(default_factory=dict)
    in_flight: deque[_InFlight] = field(default_factory=deque)
    """First in, first out: the head is the oldest."""


class Scheduler:
    """Hands batches to workers, a window of them to each, and deals with every death.

    A dead worker's oldest batch is the suspect. It is retried whole, then (one crash before
    `max_crashes`) row by row, and a row with `max_crashes` crashes, two of them by itself, is
    quarantined: one by itself may be chance, its batch mates' crashes stand on its account too.
    Everything a dead worker held is retried alone: on an idle worker, with nothing queued behind.
    So a batch that was only being written while the next one crashed is blamed once at most.
    """

    def __init__(
        self, places: Sequence[Place], config: EngineConfig, *, embeds_cache_bytes: int = 0
    ) -> None:
        self._config = config
        self._embeds_cache_bytes = embeds_cache_bytes
        self._slots = {place.worker_id: _Slot(place=place) for place in places}
        self._batcher = Batcher(config.lookahead)
        self._suspects: deque[_InFlight] = deque()
        self._decisions: list[Decision] = []
        self._num_batches = 0
        self._num_crashes_without_result = 0
        self._is_input_closed = False
        self._is_draining = False
        self._error: RaydiffError | None = None

    @property
    def wants_rows(self) -> bool:
        """Whether another request may be offered."""
        return not self._is_input_closed and not self._is_draining and not self._batcher.is_full

    @property
    def num_in_flight(self) -> int:
        """Batches that workers hold."""
        return sum(len(slot.in_flight) for slot in self._slots.values())

    @property
    def worker_states(self) -> dict[str, str]:
        """Per worker: empty, starting, idle, busy, or lost (it could not be started)."""
        return {
            slot.place.worker_id: ("busy" if slot.in_flight else "idle")
            if slot.state == "ready"
            else slot.state
            for slot in self._slots.values()
        }

    @property
    def queue_lengths(self) -> dict[str, int]:
        """What waits where, for people who watch."""
        return {"rows_waiting": self._num_queued, "in_flight_fused": self.num_in_flight}

    def offer(self, request: RenderRequest) -> None:
        """Queue a request."""
        self._batcher.add(request)

    def close_input(self) -> None:
        """Say that no more requests come."""
        self._is_input_closed = True

    def drain(self) -> None:
        """Let the batches in flight end, and start nothing more."""
        self._is_draining = True

    def abort(self, error: RaydiffError) -> None:
        """Drain, then end the run with `error`; the first error stands."""
        self._is_draining = True
        self._error = self._error or error

    def handle(self, event: Event, now: float) -> None:
        """Take in what a worker reports; reports of replaced workers are ignored."""
        slot = self._slots[event.worker_id]
        if event.incarnation != slot.incarnation or slot.state in ("empty", "lost"):
            return
        match event:
            case WorkerPlaced():
                slot.deadline = now + self._config.start_timeout_s
            case WorkerReady():
                slot.state = "ready"
                slot.num_start_failures = 0
            case WorkerFailed():
                self._worker_failed(slot, event)
            case BatchDone():
                self._batch_done(slot, event.reply)

    def decide(self, now: float) -> list[Decision]:
        """Return what to do, in order. `now` is any clock that only goes forward, in seconds."""
        if self._is_draining:
            if self.num_in_flight == 0:
                self._decisions.append(FinishRun(error=self._error))
        else:
            self._stop_late_workers(now)
            self._start_workers(now)
            self._dispatch()
            if self._is_input_closed and not self._num_queued and self.num_in_flight == 0:
                self._decisions.append(FinishRun())
        decisions, self._decisions = self._decisions, []
        return decisions

    @property
    def _num_queued(self) -> int:
        return len(self._batcher) + len(self._suspects)

    # -- deaths --------------------------------------------------------------------------------

    def _worker_failed(self, slot: _Slot, event: WorkerFailed) -> None:
        was_starting = slot.state == "starting"
        held, slot.in_flight = slot.in_flight, deque()
        slot.state = "empty"
        slot.model = None
        slot.batch_sizes.clear()
        if event.error is not None:
            self.abort(event.error)
        elif was_starting:
            self._start_failed(slot, event.reason)
        elif held:
            self._crashed(held, event.reason)

    def _start_failed(self, slot: _Slot, reason: str) -> None:
        slot.num_start_failures += 1
        if slot.num_start_failures >= MAX_START_FAILURES:
            slot.state = "lost"
        is_hopeless = not any(
            other.state in ("starting", "ready") for other in self._slots.values()
        )
        if slot.state == "lost" and is_hopeless:
            self.abort(EngineError(f"no worker could start: {reason}"))

    def _crashed(self, held: deque[_InFlight], reason: str) -> None:
        """Blame the oldest batch, and put all of them back to be retried alone."""
        suspect = held.popleft()
        suspect.num_crashes += 1
        suspect.num_crashes_alone += suspect.is_alone
        self._suspects.extendleft(reversed(held))
        is_single = len(suspect.batch.requests) == 1
        if is_single and self._is_convicted(suspect):
            self._quarantine(suspect, reason)
        elif not is_single and suspect.num_crashes >= self._config.max_crashes - 1:
            self._split(suspect)
        else:
            self._suspects.appendleft(suspect)
        self._num_crashes_without_result += 1
        if self._num_crashes_without_result >= MAX_CRASHES_WITHOUT_RESULT:
            self.abort(
                EngineError(
                    f"workers died {self._num_crashes_without_result} times in a row without "
                    f"one finished image; the last: {reason}"
                )
            )

    def _is_convicted(self, suspect: _InFlight) -> bool:
        max_crashes = self._config.max_crashes
        return suspect.num_crashes >= max_crashes and suspect.num_crashes_alone >= min(
            MIN_CRASHES_ALONE, max_crashes
        )

    def _split(self, suspect: _InFlight) -> None:
        for request in reversed(suspect.batch.requests):
            single = replace(suspect.batch, requests=(request,))
            self._suspects.appendleft(_InFlight(batch=single, num_crashes=suspect.num_crashes))

    def _quarantine(self, suspect: _InFlight, reason: str) -> None:
        result = RenderResult(
            request_id=suspect.batch.requests[0].request_id,
            status="quarantined",
            error=f"{suspect.num_crashes} workers died rendering this row; the last: {reason}",
        )
        self._decisions.append(EndRequest(result=result))

    # -- replies -------------------------------------------------------------------------------

    def _batch_done(self, slot: _Slot, reply: BatchReply) -> None:
        done = next(
            (held for held in slot.in_flight if held.batch.batch_id == reply.batch_id), None
        )
        if done is None:
            return
        slot.in_flight.remove(done)
        batch = done.batch
        key = BatchKey(model=batch.model, height=batch.height, width=batch.width)
        slot.batch_sizes[key] = reply.max_batch_size
        self._num_crashes_without_result = 0
        self._decisions.extend(EndRequest(result=result) for result in reply.results)
        if reply.disk_error is not None:
            self.abort(DiskError(reply.disk_error))

    # -- starts and dispatch -------------------------------------------------------------------

    def _stop_late_workers(self, now: float) -> None:
        for slot in self._slots.values():
            if slot.state == "starting" and now >= slot.deadline:
                # Its patience was start_timeout_s; asking for the same again would double it.
                slot.num_start_failures = MAX_START_FAILURES
                slot.deadline = float("inf")
                self._decisions.append(
                    StopWorker(
                        worker_id=slot.place.worker_id,
                        incarnation=slot.incarnation,
                        kind="unplaced",
                        reason=f"it was not ready after {self._config.start_timeout_s:g} s "
                        "(engine.start_timeout_s)",
                    )
                )

    def _start_workers(self, now: float) -> None:
        """Fill empty places while there are more queued rows than workers waiting for some."""
        num_waiting = sum(
            slot.state == "starting" or (slot.state == "ready" and not slot.in_flight)
            for slot in self._slots.values()
        )
        for slot in self._slots.values():
            if slot.state == "empty" and num_waiting < self._num_queued:
                slot.state = "starting"
                slot.incarnation += 1
                slot.deadline = now + self._config.start_timeout_s
                num_waiting += 1
                self._decisions.append(
                    StartWorker(
                        worker_id=slot.place.worker_id,
                        incarnation=slot.incarnation,
                        role=slot.place.role,
                    )
                )

    def _dispatch(self) -> None:
        """Fill the workers' windows: suspects first, each to an idle worker, then new batches."""
        for idle in self._slots.values():
            if self._suspects and idle.state == "ready" and not idle.in_flight:
                suspect = self._suspects.popleft()
                suspect.is_alone = True
                self._send(idle, suspect)
        while (slot := self._shortest_queue()) is not None:
            batch = self._batcher.take(
                partial(self._batch_size, slot),
                prefer_model=slot.model,
                # A busy worker can wait until the rows to come have filled a batch.
                flush=self._is_input_closed or not slot.in_flight,
            )
            if batch is None:
                return
            self._send(slot, _InFlight(batch=batch))

    def _shortest_queue(self) -> _Slot | None:
        """Return the ready worker with the fewest batches of those that may take one more."""
        open_slots = [slot for slot in self._slots.values() if self._has_room(slot)]
        return min(open_slots, key=lambda slot: len(slot.in_flight), default=None)

    def _has_room(self, slot: _Slot) -> bool:
        if slot.state != "ready" or (slot.in_flight and slot.in_flight[0].is_alone):
            return False
        return len(slot.in_flight) < self._config.batches_in_flight

    def _batch_size(self, slot: _Slot, key: BatchKey) -> int:
        asked = self._config.batch_size
        size = slot.batch_sizes.get(key, FIRST_BATCH_SIZE if asked == "auto" else asked)
        return min(size, self._fair_share(slot)) if self._is_input_closed else size

    def _fair_share(self, slot: _Slot) -> int:
        """Share the last rows out evenly, so that no worker idles while another has a queue."""
        depth = len(slot.in_flight)
        num_takers = sum(
            (other.state == "starting" and depth == 0)
            or (self._has_room(other) and len(other.in_flight) <= depth)
            for other in self._slots.values()
        )
        share = -(-len(self._batcher) // num_takers)
        # Pipelines pad a batch to a power of two: 9 rows would cost what 16 do.
        return 1 << (share.bit_length() - 1)

    def _send(self, slot: _Slot, held: _InFlight) -> None:
        self._num_batches += 1
        held.batch = replace(held.batch, batch_id=self._num_batches)
        slot.in_flight.append(held)
        slot.model = held.batch.model
        self._decisions.append(
            Dispatch(worker_id=slot.place.worker_id, incarnation=slot.incarnation, batch=held.batch)
        )
