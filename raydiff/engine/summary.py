"""What a session of a run took and where its time went: gathered as it goes, told at its end."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raydiff.engine.failures import failure_class
from raydiff.engine.messages import (
    Decision,
    Dispatch,
    EncodeDone,
    Event,
    Role,
    StartWorker,
    WorkerFailed,
    WorkerHealth,
    WorkerReady,
    texts_of,
)
from raydiff.engine.stage_times import STAGES, STAGES_OF_ROLE, stage_shares
from raydiff.output.progress import Progress
from raydiff.request import RenderResult

RENDER_STAGES = ("encode", "denoise", "decode")
"""Those that the render threads do; files are written beside them."""
DENOISING: tuple[Role, ...] = ("denoise", "denoise_decode")
"""Roles that are given texts encoded elsewhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionSummary:
    """Where the time of one session went."""

    stage_s: dict[str, float]
    """Seconds of all workers together, by stage; a batch that was repeated counts once."""
    slowest_stage: str | None
    """The stage whose workers had the least time to spare."""
    busy_share: dict[str, float]
    """0..1 by role: share of its ready workers' time that went into rows."""
    gpu_busy_share: float | None
    """0..1: mean of what NVML said of the workers' GPUs; None where it was never asked."""
    failures: dict[str, int]
    """Rows without an image, by class of failure."""
    restarts: dict[str, int]
    """Workers that died, could not start or were ended before the run was, by cause."""
    peak_vram_bytes: int | None
    texts_asked: int | None
    """Texts that batches of a split run needed; None in a fused run."""
    texts_encoded: int | None
    """Texts that had to be encoded for them; the others came from a cache."""
    texts_from_disk: int | None


@dataclass(slots=True)
class _Mean:
    sum: float = 0.0
    count: int = 0


class SummaryObserver:
    """Gathers a SessionSummary; its memory does not grow with the rows."""

    def __init__(self, *, num_write_threads: int = 1) -> None:
        """`num_write_threads` is of each worker: so many files are written at a time."""
        self._num_write_threads = num_write_threads
        self._stage_s: dict[str, float] = defaultdict(float)
        self._encode_calls_s = 0.0
        self._failures: Counter[str] = Counter()
        self._restarts: Counter[str] = Counter()
        self._roles: dict[str, Role] = {}
        self._ready_since: dict[str, float] = {}
        self._ready_s: dict[Role, float] = defaultdict(float)
        """Seconds that workers were ready, by role."""
        self._failed_incarnations: dict[str, int] = {}
        self._utilizations = _Mean()
        self._texts: Counter[str] = Counter()
        self._peak_vram_bytes: int | None = None

    def event(self, event: Event, now: float) -> None:
        match event:
            case WorkerReady(worker_id=worker_id):
                self._ready_since[worker_id] = now
            case WorkerFailed():
                self._worker_failed(event, now)
            case EncodeDone(reply=reply):
                self._encode_calls_s += reply.encode_s
                self._stage_s["encode"] += reply.encode_s
                self._texts["from disk"] += reply.num_from_disk
                num_failed = sum(error is not None for error in reply.errors)
                self._texts["encoded"] += len(reply.sizes) - reply.num_from_disk - num_failed

    def decision(self, decision: Decision, now: float) -> None:
        match decision:
            case StartWorker(worker_id=worker_id, role=role):
                self._roles[worker_id] = role
            case Dispatch(worker_id=worker_id) if self._role(worker_id) in DENOISING:
                asked = (len(texts_of(request)) for request in decision.batch.requests)
                self._texts["asked"] += sum(asked)

    def ended(self, result: RenderResult, num_rows: int) -> None:
        for stage, seconds in zip(STAGES, stage_shares(result), strict=True):
            self._stage_s[stage] += seconds
        failure = failure_class(result)
        if failure is not None:
            self._failures[failure] += num_rows
        if result.peak_vram_bytes is not None:
            self._peak_vram_bytes = max(self._peak_vram_bytes or 0, result.peak_vram_bytes)

    def health(self, worker_id: str, health: WorkerHealth, now: float) -> None:
        if health.gpu_utilization is not None:
            self._utilizations.sum += health.gpu_utilization
            self._utilizations.count += 1

    def warning(self, message: str) -> None:
        """Gather nothing: the log has it."""

    def progress(self, progress: Progress, queue_lengths: Mapping[str, int]) -> None:
        """Gather nothing: the ledger counts rows."""

    def close(self, summary: Mapping[str, Any]) -> None:
        """Gather nothing: this observer has made part of the summary."""

    def summary(self, now: float) -> SessionSummary:
        """Return what was gathered until `now`."""
        ready_s = defaultdict(float, self._ready_s)
        for worker_id, since in self._ready_since.items():
            ready_s[self._role(worker_id)] += now - since
        is_split = "encode" in self._roles.values()
        samples = self._utilizations
        return SessionSummary(
            stage_s={stage: round(self._stage_s[stage], 3) for stage in STAGES},
            slowest_stage=self._slowest_stage(ready_s),
            busy_share={
                role: self._busy_share(role, ready_s) for role in STAGES_OF_ROLE if role in ready_s
            },
            gpu_busy_share=round(samples.sum / samples.count, 3) if samples.count else None,
            failures=dict(self._failures),
            restarts=dict(self._restarts),
            peak_vram_bytes=self._peak_vram_bytes,
            texts_asked=self._texts["asked"] if is_split else None,
            texts_encoded=self._texts["encoded"] if is_split else None,
            texts_from_disk=self._texts["from disk"] if is_split else None,
        )

    def _worker_failed(self, event: WorkerFailed, now: float) -> None:
        # Every call that a dead worker had fails, and each says so.
        if self._failed_incarnations.get(event.worker_id) == event.incarnation:
            return
        self._failed_incarnations[event.worker_id] = event.incarnation
        self._restarts[event.cause] += 1
        since = self._ready_since.pop(event.worker_id, None)
        if since is not None:
            self._ready_s[self._role(event.worker_id)] += now - since

    def _role(self, worker_id: str) -> Role:
        return self._roles.get(worker_id, "fused")

    def _slowest_stage(self, ready_s: Mapping[Role, float]) -> str | None:
        """Return the stage that filled most of the time of the workers that do it."""
        load: dict[str, float] = {}
        for stage in STAGES:
            time_s = sum(s for role, s in ready_s.items() if stage in STAGES_OF_ROLE[role])
            if stage == "write":
                time_s *= self._num_write_threads
            if self._stage_s[stage] and time_s:
                load[stage] = self._stage_s[stage] / time_s
        return max(load, key=lambda stage: load[stage], default=None)

    def _busy_share(self, role: Role, ready_s: Mapping[Role, float]) -> float:
        if role == "encode":
            busy_s = self._encode_calls_s
        else:
            stages = [stage for stage in RENDER_STAGES if stage in STAGES_OF_ROLE[role]]
            busy_s = sum(self._stage_s[stage] for stage in stages)
        return round(min(1.0, busy_s / ready_s[role]), 3) if ready_s[role] else 0.0


def describe(summary: SessionSummary) -> list[str]:
    """Return the summary as lines for people; none where nothing was rendered."""
    lines: list[str] = []
    if summary.slowest_stage is not None:
        times = ", ".join(f"{stage} {s:.1f} s" for stage, s in summary.stage_s.items() if s)
        lines.append(f"Time: {times}; slowest: {summary.slowest_stage}.")
        busy = [
            f"{role if role != 'fused' else 'render'} {share:.0%}"
            for role, share in summary.busy_share.items()
        ]
        if summary.gpu_busy_share is not None:
            busy.append(f"GPUs {summary.gpu_busy_share:.0%}")
        lines.append(f"Busy: {', '.join(busy)} of their time.")
    if summary.peak_vram_bytes is not None:
        lines.append(f"GPU memory: {summary.peak_vram_bytes / 2**30:.1f} GiB at the peak.")
    if summary.texts_asked:
        disk = f", {summary.texts_from_disk} from the disk" if summary.texts_from_disk else ""
        lines.append(f"Texts: {summary.texts_encoded} encoded{disk}, {summary.texts_asked} used.")
    if summary.restarts:
        lines.append(f"Workers lost: {_counts(summary.restarts)}.")
    if summary.failures:
        lines.append(f"Rows lost: {_counts(summary.failures)}.")
    return lines


def _counts(counts: Mapping[str, int]) -> str:
    most_first = sorted(counts.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{number} {name}" for name, number in most_first)
