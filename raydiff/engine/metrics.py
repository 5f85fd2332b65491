"""What Prometheus is told of a run, through Ray: definitions, and an observer that counts.

No label has a value for each row; a worker's name is its place's, which its successors keep.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from raydiff.engine.failures import failure_class
from raydiff.engine.messages import (
    BatchDone,
    Decision,
    DenoiseDone,
    EncodeDone,
    Event,
    Role,
    StartWorker,
    WorkerFailed,
    WorkerHealth,
)
from raydiff.engine.stage_times import STAGES, STAGES_OF_ROLE, stage_shares
from raydiff.output.progress import Progress
from raydiff.request import RenderResult

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One metric. Ray puts `ray_` before its name, and every one has the label `run`."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()


METRICS: tuple[Metric, ...] = (
    Metric(
        name="raydiff_rows_total",
        kind="counter",
        description="Rows that ended in this session, by status",
        labels=("status",),
    ),
    Metric(
        name="raydiff_failures_total",
        kind="counter",
        description="Rows that failed or were quarantined in this session, by class",
        labels=("failure",),
    ),
    Metric(
        name="raydiff_stage_seconds",
        kind="histogram",
        description="Seconds of a batch in a stage; of write, the sum over its files",
        labels=("stage",),
        boundaries=SECONDS,
    ),
    # Ray's agent puts the middle of its bucket in each value's place, so that a histogram's sum is
    # rough: sums are counters of their own.
    Metric(
        name="raydiff_worker_seconds_total",
        kind="counter",
        description="Seconds of all workers together, by stage",
        labels=("stage",),
    ),
    Metric(
        name="raydiff_batches_total",
        kind="counter",
        description="Batches that workers have answered, by role",
        labels=("role",),
    ),
    Metric(
        name="raydiff_batch_rows_total",
        kind="counter",
        description="Rows of these batches, or texts of an encode worker's",
        labels=("role",),
    ),
    Metric(
        name="raydiff_queue_length",
        kind="gauge",
        description="What waits, or is in flight, in each of the scheduler's queues",
        labels=("queue",),
    ),
    Metric(
        name="raydiff_workers",
        kind="gauge",
        description="Places for workers, by role and state",
        labels=("role", "state"),
    ),
    Metric(
        name="raydiff_restarts_total",
        kind="counter",
        description="Workers that died, could not start or were ended, by cause",
        labels=("cause",),
    ),
    Metric(
        name="raydiff_texts_total",
        kind="counter",
        description="Texts that encode workers have encoded, or read from the disk",
        labels=("source",),
    ),
    Metric(
        name="raydiff_vram_peak_bytes",
        kind="gauge",
        description="Largest peak of GPU memory of a worker's batches",
        labels=("worker",),
    ),
    Metric(
        name="raydiff_vram_used_bytes",
        kind="gauge",
        description="Memory in use on a worker's GPU, by NVML",
        labels=("worker",),
    ),
    Metric(
        name="raydiff_gpu_utilization",
        kind="gauge",
        description="0..1: share of the last seconds in which a worker's GPU worked, by NVML",
        labels=("worker",),
    ),
    Metric(
        name="raydiff_busy_seconds",
        kind="gauge",
        description="Seconds that a worker's render thread has worked since it started",
        labels=("worker",),
    ),
    Metric(
        name="raydiff_run_rows",
        kind="gauge",
        description="Rows of the run, 0 while that is not known",
    ),
    Metric(
        name="raydiff_run_rows_ended",
        kind="gauge",
        description="Rows of the run that have ended, those of earlier sessions included",
    ),
)


KEPT = ("raydiff_vram_peak_bytes", "raydiff_run_rows", "raydiff_run_rows_ended")
"""Gauges that still say something when a worker, or the run, has ended; the others go to 0."""


class Sink(Protocol):
    """Takes values for metrics by name, with a value for each label."""

    def add(self, name: str, amount: float, labels: Mapping[str, str]) -> None:
        """Add to a counter."""

    def set(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        """Set a gauge."""

    def observe(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        """Add a value to a histogram."""


_Series = tuple[str, tuple[tuple[str, str], ...]]
"""A metric's name, and its labels with their values."""


class MetricsObserver:
    """Counts, and tells a sink a few times a second."""

    def __init__(self, open_sink: Callable[[Sequence[Metric]], Sink | None]) -> None:
        """`open_sink` gives None for as long as there is nothing to tell: Ray starts with the first
        worker. What was counted by then is kept."""
        self._open_sink = open_sink
        self._sink: Sink | None = None
        self._counts: dict[_Series, float] = defaultdict(float)
        """What was added since the sink was last told."""
        self._values: list[tuple[str, float, dict[str, str]]] = []
        """Of histograms, likewise."""
        self._gauges: dict[_Series, float] = {}
        self._roles: dict[str, Role] = {}
        self._failed_incarnations: dict[str, int] = {}
        self._peaks: Counter[str] = Counter()

    def event(self, event: Event, now: float) -> None:
        match event:
            case WorkerFailed():
                self._worker_failed(event)
            case EncodeDone(reply=encoded):
                num_texts = len(encoded.sizes)
                num_failed = sum(error is not None for error in encoded.errors)
                self._batch("encode", num_texts)
                self._stage("encode", encoded.encode_s)
                self._add("raydiff_texts_total", encoded.num_from_disk, source="disk")
                num_encoded = num_texts - num_failed - encoded.num_from_disk
                self._add("raydiff_texts_total", num_encoded, source="encoded")
            case DenoiseDone(worker_id=worker_id, reply=denoised):
                self._batch("denoise", len(denoised.request_ids) + len(denoised.results))
                self._stage("denoise", denoised.denoise_s)
                self._peak(worker_id, denoised.peak_vram_bytes)
            case BatchDone(worker_id=worker_id, reply=reply):
                self._batch_done(worker_id, reply.results)

    def decision(self, decision: Decision, now: float) -> None:
        if isinstance(decision, StartWorker):
            self._roles[decision.worker_id] = decision.role

    def ended(self, result: RenderResult, num_rows: int) -> None:
        self._add("raydiff_rows_total", num_rows, status=result.status)
        failure = failure_class(result)
        if failure is not None:
            self._add("raydiff_failures_total", num_rows, failure=failure)

    def health(self, worker_id: str, health: WorkerHealth, now: float) -> None:
        self._set("raydiff_busy_seconds", health.busy_s, worker=worker_id)
        if health.gpu_utilization is not None:
            self._set("raydiff_gpu_utilization", health.gpu_utilization, worker=worker_id)
        if health.vram_used_bytes is not None:
            self._set("raydiff_vram_used_bytes", health.vram_used_bytes, worker=worker_id)

    def warning(self, message: str) -> None:
        """Count nothing: the log has it."""

    def progress(self, progress: Progress, queue_lengths: Mapping[str, int]) -> None:
        """Take how far the run is, and tell the sink."""
        for queue, length in queue_lengths.items():
            self._set("raydiff_queue_length", length, queue=queue)
        self._set("raydiff_run_rows", progress.total or 0)
        ended = progress.done + progress.failed + progress.quarantined
        self._set("raydiff_run_rows_ended", ended)
        self._count_workers(progress.workers)
        self._tell()

    def close(self, summary: Mapping[str, Any]) -> None:
        """Tell the sink what is left; nothing is at work or waits any more."""
        for name, labels in self._gauges:
            if name not in (
                "raydiff_vram_peak_bytes",
                "raydiff_run_rows",
                "raydiff_run_rows_ended",
            ):
                self._gauges[name, labels] = 0
        self._tell()

    def _worker_failed(self, event: WorkerFailed) -> None:
        # Every call that a dead worker had fails, and each says so.
        if self._failed_incarnations.get(event.worker_id) == event.incarnation:
            return
        self._failed_incarnations[event.worker_id] = event.incarnation
        self._add("raydiff_restarts_total", 1, cause=event.cause)
        for name, labels in self._gauges:
            if labels == (("worker", event.worker_id),) and name not in KEPT:
                self._gauges[name, labels] = 0

    def _batch_done(self, worker_id: str, results: Sequence[RenderResult]) -> None:
        role = self._roles.get(worker_id, "fused")
        self._batch(role, len(results))
        shares = zip(*map(stage_shares, results), strict=True)
        for stage, seconds in zip(STAGES, shares, strict=False):
            if stage in STAGES_OF_ROLE[role]:
                self._stage(stage, sum(seconds))
        for result in results:
            self._peak(worker_id, result.peak_vram_bytes)

    def _batch(self, role: Role, num_rows: int) -> None:
        self._add("raydiff_batches_total", 1, role=role)
        self._add("raydiff_batch_rows_total", num_rows, role=role)

    def _stage(self, stage: str, seconds: float) -> None:
        if seconds:
            self._add("raydiff_worker_seconds_total", seconds, stage=stage)
            self._values.append(("raydiff_stage_seconds", seconds, {"stage": stage}))

    def _peak(self, worker_id: str, peak_vram_bytes: int | None) -> None:
        if peak_vram_bytes is not None and peak_vram_bytes > self._peaks[worker_id]:
            self._peaks[worker_id] = peak_vram_bytes
            self._set("raydiff_vram_peak_bytes", peak_vram_bytes, worker=worker_id)

    def _count_workers(self, workers: Sequence[Mapping[str, Any]]) -> None:
        for name, labels in self._gauges:
            if name == "raydiff_workers":
                self._gauges[name, labels] = 0  # also of states that no worker is in any more
        states = Counter(
            (self._roles.get(worker["worker_id"], "fused"), worker["state"]) for worker in workers
        )
        for (role, state), number in states.items():
            self._set("raydiff_workers", number, role=role, state=state)

    def _set(self, name: str, value: float, **labels: str) -> None:
        self._gauges[name, tuple(labels.items())] = value

    def _add(self, name: str, amount: float, **labels: str) -> None:
        self._counts[name, tuple(labels.items())] += amount

    def _tell(self) -> None:
        if self._sink is None:
            self._sink = self._open_sink(METRICS)
        if self._sink is None:
            del self._values[:-1000]  # a run that waits for its first worker has few of them
            return
        for (name, pairs), amount in self._counts.items():
            if amount:
                self._sink.add(name, amount, dict(pairs))
        for name, observed, labels in self._values:
            self._sink.observe(name, observed, labels)
        for (name, pairs), level in self._gauges.items():
            self._sink.set(name, level, dict(pairs))
        self._counts.clear()
        self._values.clear()
