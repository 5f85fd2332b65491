"""Who watches a run: the log, the metrics and the summary. They see everything and change nothing.

The driver calls them from its loop, so each of them must be quick and must not fail.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from raydiff.engine.messages import Decision, Event, WorkerHealth
from raydiff.output.progress import Progress
from raydiff.request import RenderResult


class Observer(Protocol):
    """What the driver tells. `now` is its monotonic clock, in seconds."""

    def event(self, event: Event, now: float) -> None:
        """Take what the cluster reported, before the scheduler gets it."""

    def decision(self, decision: Decision, now: float) -> None:
        """Take what the scheduler decided, before it is done."""

    def ended(self, result: RenderResult, num_rows: int) -> None:
        """Take the result of a request, and how many rows of this session got it."""

    def health(self, worker_id: str, health: WorkerHealth, now: float) -> None:
        """Take a worker's answer to a ping."""

    def warning(self, message: str) -> None:
        """Take what people were told."""

    def progress(self, progress: Progress, queue_lengths: Mapping[str, int]) -> None:
        """Take how far the run is: a few times a second."""

    def close(self, summary: Mapping[str, Any]) -> None:
        """Take the run's summary, with an `error` where one ended it. Nothing comes after it."""


class Observers:
    """Tells each of several observers, in their order."""

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._observers = tuple(observers)

    def event(self, event: Event, now: float) -> None:
        for observer in self._observers:
            observer.event(event, now)

    def decision(self, decision: Decision, now: float) -> None:
        for observer in self._observers:
            observer.decision(decision, now)

    def ended(self, result: RenderResult, num_rows: int) -> None:
        for observer in self._observers:
            observer.ended(result, num_rows)

    def health(self, worker_id: str, health: WorkerHealth, now: float) -> None:
        for observer in self._observers:
            observer.health(worker_id, health, now)

    def warning(self, message: str) -> None:
        for observer in self._observers:
            observer.warning(message)

    def progress(self, progress: Progress, queue_lengths: Mapping[str, int]) -> None:
        for observer in self._observers:
            observer.progress(progress, queue_lengths)

    def close(self, summary: Mapping[str, Any]) -> None:
        for observer in self._observers:
            observer.close(summary)
