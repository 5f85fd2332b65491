"""The scheduler's decisions become calls of worker actors; their replies and deaths become events.

Embeddings and latents stay references here and go from worker to worker.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raydiff import __version__
from raydiff.engine.cluster import HEALTH, RaySession, Whereabouts
from raydiff.engine.cluster_file import ClusterLayout
from raydiff.engine.messages import (
    BatchDone,
    Cause,
    Decision,
    DenoiseDone,
    Dispatch,
    DropEmbeds,
    DropLatents,
    Encode,
    EncodeDone,
    Event,
    Flush,
    FlushDone,
    InputsLost,
    Role,
    StartWorker,
    StopKind,
    StopWorker,
    TextKey,
    WorkerFailed,
    WorkerHealth,
    WorkerInfo,
    WorkerLeaving,
    WorkerPlaced,
    WorkerReady,
    texts_of,
)
from raydiff.engine.worker import Worker
from raydiff.errors import InputError

READ_S = 30.0
"""A reply is read when it is here; this bounds what a dying node makes of it."""
MAX_GAP_S = 5.0
"""The driver itself stood still (suspended, or in a slow commit) if it was away for longer."""
MAX_PING_INTERVAL_S = 5.0
FAULT = "Fatal Python error: "
STOP_CAUSES: dict[StopKind, Cause] = {
    "unplaced": "start",
    "late": "start",
    "hung": "hung",
    "retired": "stopped",
    "drained": "stopped",
}

CallKind = Literal["lifetime", "where", "start", "ping", "encode", "batch", "denoise", "flush"]


@dataclass(eq=False, kw_only=True, slots=True)
class _Process:
    """The process that has a worker's place now."""

    worker_id: str
    incarnation: int
    role: Role
    actor: Any
    where: Whereabouts | None = None
    """None until it is placed."""
    info: WorkerInfo | None = None
    """None until its model is loaded."""
    is_ready: bool = False
    is_leaving: bool = False
    is_stuck: bool = False
    """It may be there still, and not obey."""
    is_pinged: bool = False
    pinged_at: float = 0.0
    answered_at: float = 0.0

    def failed(self, reason: str, cause: Cause, error: InputError | None = None) -> WorkerFailed:
        return WorkerFailed(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            reason=f"worker {self.worker_id}: {reason}",
            cause=cause,
            error=error,
        )


@dataclass(frozen=True, slots=True)
class _Call:
    """Whose answer a pending reference is, and what else it will bring."""

    process: _Process
    kind: CallKind
    batch_id: int | None = None
    texts: tuple[TextKey, ...] = ()
    outputs: tuple[Any, ...] = ()
    """References to embeddings of `texts`, or to a batch's latents."""


class WorkerPool:
    """The workers of one run, on a private Ray or on a cluster."""

    def __init__(
        self,
        session: RaySession,
        layout: ClusterLayout,
        specs: Mapping[Role, Any],
        *,
        worker_class: type[Any] = Worker,
        mark: Path | None = None,
        health_timeout_s: float = 60.0,
        on_health: Callable[[str, WorkerHealth], None] | None = None,
    ) -> None:
        """A worker is `worker_class(worker_id, spec)` with the methods that its role needs.

        Those that answer pings have `health`. `mark` is a file that each must see.
        """
        self._session = session
        self._layout = layout
        self._specs = specs
        self._worker_class = worker_class
        self._mark = mark
        self._health_timeout_s = health_timeout_s
        self._on_health = on_health
        self._processes: dict[str, _Process] = {}
        self._pending: dict[Any, _Call] = {}
        self._events: list[Event] = []
        self._embeds: dict[TextKey, Any] = {}
        self._latents: dict[int, Any] = {}
        self._polled_at = time.monotonic()

    def carry_out(self, decision: Decision) -> None:
        """Do what the scheduler decided; `poll` reports what comes of it."""
        match decision:
            case StartWorker():
                self._start(decision)
            case StopWorker():
                self._stop(decision)
            case Encode():
                self._encode(decision)
            case Dispatch():
                self._dispatch(decision)
            case Flush():
                process = self._processes[decision.worker_id]
                self._pending[process.actor.flush.remote()] = _Call(process, "flush")
            case DropEmbeds():
                for text in decision.texts:
                    self._embeds.pop(text, None)
            case DropLatents():
                self._latents.pop(decision.batch_id, None)

    def render(self, worker_id: str, batch: Any) -> None:
        """Send a batch to a worker that does all of it; `poll` reports its reply as BatchDone."""
        process = self._processes[worker_id]
        self._pending[process.actor.render.remote(batch)] = _Call(process, "batch")

    def poll(self, timeout_s: float) -> list[Event]:
        """Wait for at least one report, at most `timeout_s`; replies come before failures.

        Raises EngineError when the cluster's head is gone.
        """
        events = self._wait(0 if self._events else timeout_s)
        events, self._events = self._events + events, []
        if self._processes:
            now = time.monotonic()
            self._session.check_alive()
            events += self._leaving()
            events += self._hung(now)
            self._polled_at = now
        events.sort(key=lambda event: isinstance(event, WorkerFailed))
        for event in events:
            if isinstance(event, WorkerFailed):
                self._forget(event.worker_id, event.incarnation)
        return events

    def unmet(self, role: Role) -> str:
        """Say what a worker of this role asks for that no node has free."""
        return self._session.unmet(self._layout.by_role[role])

    def close(self) -> None:
        """End the workers."""
        for process in list(self._processes.values()):
            self._forget(process.worker_id, process.incarnation)
        self._pending.clear()
        self._embeds.clear()
        self._latents.clear()

    # -- decisions ---------------------------------------------------------------------------------

    def _start(self, decision: StartWorker) -> None:
        placement = self._layout.by_role[decision.role]
        spec = self._specs[decision.role]
        actor = self._session.start_actor(
            placement, self._worker_class, decision.worker_id, spec, self._mark
        )
        process = _Process(
            worker_id=decision.worker_id,
            incarnation=decision.incarnation,
            role=decision.role,
            actor=actor,
        )
        self._processes[decision.worker_id] = process
        where = actor.where.options(concurrency_group=HEALTH).remote()
        first_calls: tuple[tuple[Any, CallKind], ...] = (
            (actor.lifetime.remote(), "lifetime"),
            (where, "where"),
            (actor.start.remote(), "start"),
        )
        for ref, kind in first_calls:
            self._pending[ref] = _Call(process, kind)

    def _stop(self, decision: StopWorker) -> None:
        process = self._processes.get(decision.worker_id)
        if process is None or process.incarnation != decision.incarnation:
            return
        reason = decision.reason
        if decision.kind == "unplaced":
            reason = f"{reason}: {self.unmet(process.role)}"
        process.is_stuck = decision.kind in ("late", "hung")
        self._events.append(process.failed(reason, STOP_CAUSES[decision.kind]))
        self._forget(decision.worker_id, decision.incarnation)

    def _encode(self, decision: Encode) -> None:
        process = self._processes[decision.worker_id]
        texts = decision.batch.texts
        method = process.actor.encode.options(num_returns=1 + len(texts))
        reply, *embeds = method.remote(decision.batch)
        self._pending[reply] = _Call(process, "encode", texts=texts, outputs=tuple(embeds))

    def _dispatch(self, decision: Dispatch) -> None:
        process, batch = self._processes[decision.worker_id], decision.batch
        actor = process.actor
        outputs: tuple[Any, ...] = ()
        if process.role == "fused":
            return self.render(decision.worker_id, batch)
        if process.role == "decode":
            latents = self._latents.get(batch.batch_id)
            if latents is None:
                return self._inputs_lost(process, batch.batch_id)
            reply = actor.decode.remote(batch, decision.denoised, latents)
        else:
            texts = tuple(
                dict.fromkeys(text for request in batch.requests for text in texts_of(request))
            )
            embeds = [self._embeds.get(text) for text in texts]
            if None in embeds:
                return self._inputs_lost(process, batch.batch_id)
            if process.role == "denoise_decode":
                reply = actor.render_encoded.remote(batch, texts, *embeds)
            else:
                reply, *latents = actor.denoise.options(num_returns=2).remote(batch, texts, *embeds)
                outputs = tuple(latents)
        kind: CallKind = "denoise" if outputs else "batch"
        self._pending[reply] = _Call(process, kind, batch_id=batch.batch_id, outputs=outputs)
        return None

    def _inputs_lost(self, process: _Process, batch_id: int) -> None:
        self._events.append(_inputs_lost(process, batch_id))

    # -- reports -----------------------------------------------------------------------------------

    def _wait(self, timeout_s: float) -> list[Event]:
        """Return what the answers that are here say, after waiting for the first."""
        if not self._pending:
            time.sleep(timeout_s)
            return []
        ray = self._session.open()
        refs = list(self._pending)
        ready, _ = ray.wait(refs, timeout=timeout_s)
        if ready:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        return [event for ref in ready for event in self._read(ref, self._pending.pop(ref))]

    def _read(self, ref: Any, call: _Call) -> list[Event]:
        ray = self._session.open()
        errors = ray.exceptions
        try:
            value = ray.get(ref, timeout=READ_S)
        except errors.RayTaskError as error:
            return [self._call_failed(call, error.cause)]
        except errors.RayActorError as error:
            if error.actor_id not in (None, call.process.actor._actor_id.hex()):
                return [self._call_failed(call, error)]
            return [self._died(call.process, error)]
        except (errors.ObjectLostError, errors.GetTimeoutError) as error:
            return [call.process.failed(f"its reply is lost: {_first_line(error)}", "node")]
        except errors.RayError as error:
            cause = self._cause(call.process, "process")
            return [call.process.failed(_first_line(error), cause)]
        call.process.answered_at = time.monotonic()
        return self._answered(call, value)

    def _answered(self, call: _Call, value: Any) -> list[Event]:
        process = call.process
        worker_id, incarnation = process.worker_id, process.incarnation
        match call.kind:
            case "where":
                process.where = value
                return self._placed(process, value)
            case "start":
                process.info = value
                return self._ready(process)
            case "ping":
                process.is_pinged = False
                if self._on_health is not None:
                    self._on_health(worker_id, value)
            case "encode":
                for text, embeds, error in zip(call.texts, call.outputs, value.errors, strict=True):
                    if error is None:
                        self._embeds[text] = embeds
                return [EncodeDone(worker_id=worker_id, incarnation=incarnation, reply=value)]
            case "denoise":
                self._latents[value.batch_id] = call.outputs[0]
                return [DenoiseDone(worker_id=worker_id, incarnation=incarnation, reply=value)]
            case "batch":
                return [BatchDone(worker_id=worker_id, incarnation=incarnation, reply=value)]
            case "flush":
                return [FlushDone(worker_id=worker_id, incarnation=incarnation, reply=value)]
        return []

    def _placed(self, process: _Process, where: Whereabouts) -> list[Event]:
        if where.version != __version__:
            reason = (
                f"node {where.address} has raydiff {where.version}, the driver {__version__}. "
                "Install the same version on every node."
            )
            return [process.failed(reason, "start")]
        placed = WorkerPlaced(worker_id=process.worker_id, incarnation=process.incarnation)
        return [placed, *self._ready(process)]

    def _ready(self, process: _Process) -> list[Event]:
        """Report a worker that has said both where it is and that its model is loaded."""
        if process.info is None or process.where is None:
            return []
        process.is_ready = True
        return [
            WorkerReady(
                worker_id=process.worker_id, incarnation=process.incarnation, info=process.info
            )
        ]

    def _call_failed(self, call: _Call, cause: BaseException | None) -> Event:
        """Tell a worker's own error from one of the node that held its inputs."""
        process, errors = call.process, self._session.open().exceptions
        is_upstream = isinstance(cause, errors.ObjectLostError | errors.RayActorError)
        if call.batch_id is not None and is_upstream:
            return _inputs_lost(process, call.batch_id)
        # One node's missing file or model says nothing of the others.
        final = cause if isinstance(cause, InputError) and self._session.is_private else None
        return process.failed(str(cause), self._cause(process, "process"), final)

    def _died(self, process: _Process, error: Any) -> WorkerFailed:
        is_node = (
            "node has died" in str(error)
            or error.preempted
            or (
                process.where is not None and not self._session.still_answers(process.where.node_id)
            )
        )
        if is_node:
            address = process.where.address if process.where else "unknown"
            return process.failed(f"its node {address} died", "node")
        process.is_stuck = isinstance(error, self._session.open().exceptions.ActorUnavailableError)
        last_words = self._last_words(process) or _cause_of_death(error)
        return process.failed(f"died: {last_words}", self._cause(process, "process"))

    def _cause(self, process: _Process, cause: Cause) -> Cause:
        return cause if process.is_ready else "start"

    def _last_words(self, process: _Process) -> str | None:
        """Return what Python's fault handler wrote as the process crashed, if it did so here."""
        pid = process.where.pid if process.where else 0
        for log in self._session.logs.glob(f"worker-*-{pid}.err"):
            for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
                if line.startswith(FAULT):
                    return line.removeprefix(FAULT)
        return None

    # -- nodes that leave, processes that hang -----------------------------------------------------

    def _leaving(self) -> Iterator[Event]:
        draining = self._session.draining
        for process in self._processes.values():
            where = process.where
            if where is not None and where.node_id in draining and not process.is_leaving:
                process.is_leaving = True
                yield WorkerLeaving(
                    worker_id=process.worker_id,
                    incarnation=process.incarnation,
                    reason=f"its node {where.address} is being drained",
                )

    def _hung(self, now: float) -> list[Event]:
        """Ping the workers; return those that have not answered for too long."""
        ready = [process for process in self._processes.values() if process.is_ready]
        if now - self._polled_at > MAX_GAP_S:
            for process in ready:
                process.answered_at = now
        interval_s = min(self._health_timeout_s / 4, MAX_PING_INTERVAL_S)
        hung: list[Event] = []
        for process in ready:
            if process.is_pinged:
                if now - process.answered_at > self._health_timeout_s:
                    hung.append(self._hangs(process, now))
            elif now - process.pinged_at >= interval_s:
                process.is_pinged, process.pinged_at = True, now
                ping = process.actor.health.options(concurrency_group=HEALTH).remote()
                self._pending[ping] = _Call(process, "ping")
        return hung

    def _hangs(self, process: _Process, now: float) -> WorkerFailed:
        process.is_stuck = True
        silent_s = now - process.answered_at
        return process.failed(
            f"killed: it has not answered for {silent_s:.0f} s (engine.health_timeout_s)", "hung"
        )

    def _forget(self, worker_id: str, incarnation: int) -> None:
        """Kill what is left of a worker and expect nothing more from it."""
        process = self._processes.get(worker_id)
        if process is not None and process.incarnation == incarnation:
            del self._processes[worker_id]
            self._session.kill(process.actor, process.where, is_stuck=process.is_stuck)
            self._pending = {
                ref: call for ref, call in self._pending.items() if call.process is not process
            }


def _inputs_lost(process: _Process, batch_id: int) -> InputsLost:
    return InputsLost(
        worker_id=process.worker_id, incarnation=process.incarnation, batch_id=batch_id
    )


def _cause_of_death(error: Exception) -> str:
    """Pick the exit type and the first sentence of the detail out of Ray's long message."""
    found = re.search(r"Worker exit type: (\w+) Worker exit detail: ([^.]*)", str(error))
    if found is None:
        return _first_line(error)
    kind, detail = found.groups()
    if kind == "SYSTEM_ERROR":
        return "killed (out of host memory?) or crashed in native code"
    return f"{kind}: {detail}"


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
