"""The places of a run and the workers in them: filled, waited for, given up, taken away."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from raydiff.config import EngineConfig
from raydiff.engine.messages import Place, Role, StartWorker, StopKind, StopWorker, WorkerFailed
from raydiff.errors import EngineError
from raydiff.request import BatchKey, RenderRequest, RenderResult

MAX_START_FAILURES = 3
"""Starts in a row that may fail before a worker's place is given up."""


class Unpublished(NamedTuple):
    """A row that is rendered and waits in a worker's open shard."""

    request: RenderRequest
    since: float


class Outcome(NamedTuple):
    """A row and what became of it at a worker."""

    request: RenderRequest
    result: RenderResult


@dataclass(eq=False, kw_only=True, slots=True)
class Slot:
    """A place, and the process that has it now."""

    place: Place
    state: Literal["empty", "pending", "loading", "ready", "lost"] = "empty"
    """pending: no node has taken it yet. loading: it loads its model. lost: it is given up."""
    incarnation: int = 0
    since: float = 0.0
    """When `state` began."""
    num_start_failures: int = 0
    is_removed: bool = False
    """The place is no more; its worker may end what it holds."""
    leaving: Literal["drained", "retired"] | None = None
    """It gets nothing new, and is stopped for this reason as soon as it holds nothing."""
    leaving_reason: str = ""
    stopping: StopKind | None = None
    """StopWorker has been said."""
    was_late: bool = False
    model: str | None = None
    """Of the last batch: resident in the worker."""
    batch_sizes: dict[BatchKey, int] = field(default_factory=dict)
    in_flight: deque[Any] = field(default_factory=deque)
    """Jobs, first in, first out: the head is the oldest."""
    head_since: float = 0.0
    """When the head can have begun: it was sent, and the head before it had ended."""
    unpublished: dict[str, Unpublished] = field(default_factory=dict)
    """By request_id, the oldest first."""
    flushing: tuple[str, ...] | None = None
    """While a flush is under way: what was unpublished as it began."""
    flush_since: float = 0.0
    is_flushed: bool = False
    """Its last flush of a run that ends is done."""
    withheld: list[Outcome] = field(default_factory=list)
    """Failures that may be the worker's fault."""
    num_failures: int = 0
    """Failures since its last success."""

    @property
    def takes_work(self) -> bool:
        """Whether it may be given something new."""
        return self.state == "ready" and self.leaving is None and self.stopping is None

    @property
    def is_idle(self) -> bool:
        """Whether it waits for work."""
        return self.takes_work and not self.in_flight

    @property
    def may_go(self) -> bool:
        """Whether it may be stopped as it leaves: it holds nothing that would be lost."""
        if self.unpublished or self.flushing is not None:
            return False
        return not self.in_flight or self.leaving == "retired"

    @property
    def shown_state(self) -> str:
        """What people are told: idle or busy is more than ready."""
        if self.state != "ready":
            return self.state
        if self.leaving is not None:
            return "leaving"
        return "busy" if self.in_flight else "idle"

    def placed(self, now: float) -> None:
        """Note that a node has taken it."""
        if self.state == "pending":
            self.state, self.since = "loading", now

    def ready(self, now: float) -> None:
        """Note that it has loaded its model."""
        self.state, self.since = "ready", now
        self.num_start_failures = 0

    def is_late_again(self, is_late: bool) -> bool:
        """Whether it is late at two looks in a row.

        A driver that was stopped or busy for long finds the answer among those that wait for it.
        """
        was_late, self.was_late = self.was_late, is_late
        return was_late and is_late

    def leave(self, kind: Literal["drained", "retired"], reason: str) -> None:
        """Give it nothing new, and end it when it holds nothing."""
        if self.leaving is None:
            self.leaving = kind
            self.leaving_reason = reason

    def vacate(self) -> None:
        """Forget the process, not the place."""
        self.state = "empty"
        self.leaving = None
        self.leaving_reason = ""
        self.stopping = None
        self.was_late = False
        self.model = None
        self.batch_sizes = {}
        self.in_flight = deque()
        self.unpublished = {}
        self.flushing = None
        self.is_flushed = False
        self.withheld = []
        self.num_failures = 0


class Places:
    """The slots of a run by name and by role, and the start of what runs in them."""

    def __init__(self, places: Sequence[Place], config: EngineConfig) -> None:
        self._config = config
        self._slots: dict[str, Slot] = {}
        self._incarnations: dict[str, int] = {}
        """Of places that are no more, should they come back: late reports must not fit."""
        self._start_errors: dict[Role, str] = {}
        self._by_role: dict[Role, list[Slot]] = {}
        self.set(places)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots.values())

    def of(self, role: Role) -> list[Slot]:
        """Return the places of a role."""
        return self._by_role.get(role, [])

    def find(self, worker_id: str, incarnation: int) -> Slot | None:
        """Return the place of a worker; None where another one has it by now."""
        slot = self._slots.get(worker_id)
        if slot is None or slot.incarnation != incarnation or slot.state in ("empty", "lost"):
            return None
        return slot

    def set(self, places: Sequence[Place]) -> None:
        """Have these places and no others; a worker whose place goes may end what it holds."""
        wanted = {place.worker_id: place for place in places}
        for worker_id, place in wanted.items():
            slot = self._slots.get(worker_id)
            if slot is None:
                slot = Slot(place=place, incarnation=self._incarnations.get(worker_id, 0))
                self._slots[worker_id] = slot
                self._start_errors.pop(place.role, None)
            slot.is_removed = False
        for slot in list(self):
            if slot.place.worker_id not in wanted:
                slot.is_removed = True
                slot.leave("drained", "its place is no longer wanted")
                self.forget_removed(slot)
        self._index()

    # -- starts --------------------------------------------------------------------------------

    def start(self, role: Role, num_jobs: int, now: float) -> Iterator[StartWorker]:
        """Fill empty places while there are more jobs than workers that wait for one.

        Elastic places come last, and do not count for the others: they may stay empty.
        """
        for is_elastic in (False, True):
            num_waiting = sum(
                self.waits_for_work(slot, now) and (is_elastic or not slot.place.is_elastic)
                for slot in self.of(role)
            )
            for slot in self.of(role):
                is_free = slot.state == "empty" and slot.place.is_elastic is is_elastic
                if not is_free or slot.is_removed or num_waiting >= num_jobs:
                    continue
                slot.state = "pending"
                slot.since = now
                slot.incarnation += 1
                num_waiting += 1
                yield StartWorker(
                    worker_id=slot.place.worker_id, incarnation=slot.incarnation, role=role
                )

    def waits_for_work(self, slot: Slot, now: float) -> bool:
        """Whether a worker is idle, or will soon be there."""
        return slot.is_idle or self.is_coming(slot, now)

    def is_coming(self, slot: Slot, now: float) -> bool:
        """Whether a worker is being started and has time left for it."""
        if slot.stopping is not None or slot.leaving is not None:
            return False
        return slot.state in ("pending", "loading") and not self._is_late(slot, now)

    def stop_late(self, now: float) -> Iterator[StopWorker]:
        """Stop workers that have used up their time to start.

        An elastic place may wait for a node for as long as its role has another worker.
        """
        for slot in self:
            if slot.state not in ("pending", "loading") or slot.stopping is not None:
                continue
            if not slot.is_late_again(self._is_late(slot, now)):
                continue
            is_pending = slot.state == "pending"
            if is_pending and slot.place.is_elastic and self._has_hope(slot.place.role, now):
                continue
            limit = f"{self._config.start_timeout_s:g} s (engine.start_timeout_s)"
            yield stop(
                slot,
                "unplaced" if is_pending else "late",
                f"no node took it in {limit}"
                if is_pending
                else f"it had not loaded its model after {limit}",
            )

    def start_failed(self, slot: Slot, event: WorkerFailed, stopped: StopKind | None) -> None:
        """Give a place up whose worker cannot start; a node that went away is no such reason."""
        if stopped in ("unplaced", "late"):
            # Its patience was start_timeout_s; asking for the same again would double it.
            slot.state = "lost"
        elif event.cause not in ("node", "stopped"):
            slot.num_start_failures += 1
            if slot.num_start_failures >= MAX_START_FAILURES:
                slot.state = "lost"
        if slot.state == "lost":
            self._start_errors[slot.place.role] = event.reason

    def dead_role(self, role: Role, now: float) -> EngineError | None:
        """Return why no worker of a role can ever be had; None where one can."""
        name = "worker" if role == "fused" else f"{role} worker"
        if not self.of(role):
            return EngineError(f"no place for a {name} is left")
        if role in self._start_errors and not self._has_hope(role, now):
            return EngineError(f"no {name} could start: {self._start_errors[role]}")
        return None

    def forget_removed(self, slot: Slot) -> None:
        """Forget a place that is no more, if its worker is gone too."""
        if slot.is_removed and slot.state in ("empty", "lost"):
            self._incarnations[slot.place.worker_id] = slot.incarnation
            del self._slots[slot.place.worker_id]
            self._index()

    def _has_hope(self, role: Role, now: float) -> bool:
        """Whether a worker of the role is there, comes in time, or is about to be replaced."""
        return any(
            slot.state == "ready"
            or self.is_coming(slot, now)
            or (slot.leaving is not None and not slot.is_removed)
            or (slot.state == "empty" and slot.incarnation > 0)
            for slot in self.of(role)
        )

    def _is_late(self, slot: Slot, now: float) -> bool:
        return now >= slot.since + self._config.start_timeout_s

    def _index(self) -> None:
        self._by_role = {}
        for slot in self:
            self._by_role.setdefault(slot.place.role, []).append(slot)


def stop(slot: Slot, kind: StopKind, reason: str) -> StopWorker:
    """Say once that a worker is to be killed."""
    slot.stopping = kind
    return StopWorker(
        worker_id=slot.place.worker_id, incarnation=slot.incarnation, kind=kind, reason=reason
    )
