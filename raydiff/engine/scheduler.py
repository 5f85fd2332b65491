"""Who renders what, and what happens when a worker dies. Pure: no Ray, no clock, no I/O.

Events come in through `handle`, `offer`, `close_input`, `drain`; `decide(now)` says what to do.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from raydiff.config import EngineConfig
from raydiff.engine import open_shards
from raydiff.engine.circuit_breaker import CircuitBreaker
from raydiff.engine.encoding import DoomedRow
from raydiff.engine.jobs import RowJob, TextJob
from raydiff.engine.messages import (
    BatchDone,
    BatchReply,
    Decision,
    DenoiseDone,
    DenoiseReply,
    DropLatents,
    EncodeDone,
    EncodeReply,
    EndRequest,
    Event,
    FinishRun,
    Flush,
    FlushDone,
    FlushReply,
    InputsLost,
    Place,
    Role,
    WorkerFailed,
    WorkerLeaving,
    WorkerPlaced,
    WorkerReady,
)
from raydiff.engine.open_shards import OpenShards
from raydiff.engine.places import Outcome, Places, Slot, Unpublished, stop
from raydiff.engine.stages import Stages, pipeline_of
from raydiff.errors import DiskError, EngineError, RaydiffError
from raydiff.request import RenderRequest, RenderResult, Status

MAX_CRASHES_WITHOUT_RESULT = 10
"""Crashes of a role in a row, with nothing done in between, that end the run: then it is not the
rows' fault."""
MAX_INPUTS_LOST = 5
"""Times that a batch may lose its embeddings or latents with their node before its rows fail."""


class Scheduler:
    """Hands batches to workers, a window of them to each, and deals with every death.

    A dead worker's oldest batch is the suspect (see `Job.blame`). Everything that the worker held
    is retried alone: on an idle worker, with nothing queued behind. So a batch that was only
    being written while the next one crashed is blamed once at most. Nothing is blamed for a
    worker that was stopped, or whose node went away: what that one held goes to the next.

    A row ends when its worker has published its file. One that lies in an open shard, or failed
    on a worker on which everything fails, is rendered again when that worker is gone.
    """

    def __init__(
        self,
        places: Sequence[Place],
        config: EngineConfig,
        *,
        embeds_cache_bytes: int = 0,
        shard_s: float = math.inf,
    ) -> None:
        """`embeds_cache_bytes` is for split runs, `shard_s` for rows that wait in shards."""
        self._config = config
        self._places = Places(places, config)
        self._decisions: list[Decision] = []
        self._stages = Stages(
            self._places,
            pipeline_of(places),
            config,
            embeds_cache_bytes=embeds_cache_bytes,
            say=self._decisions.append,
            quarantine=self._quarantine,
        )
        self._shards = OpenShards(shard_s)
        self._breaker = CircuitBreaker(config)
        self._crashes_without_result: Counter[Role] = Counter()
        self._is_draining = False
        self._error: RaydiffError | None = None

    @property
    def wants_rows(self) -> bool:
        """Whether another request may be offered."""
        is_over = self._stages.is_input_closed or self._is_draining
        return not is_over and not self._stages.is_input_full

    @property
    def worker_states(self) -> dict[str, str]:
        """Per worker: empty, pending (no node has it yet), loading, idle, busy, leaving or lost."""
        return {slot.place.worker_id: slot.shown_state for slot in self._places}

    @property
    def queue_lengths(self) -> dict[str, int]:
        """Rows, texts and batches that wait, by where they do."""
        return self._stages.queue_lengths | {
            "rows_unpublished": sum(len(slot.unpublished) for slot in self._places),
            "rows_withheld": sum(len(slot.withheld) for slot in self._places),
        }

    def offer(self, request: RenderRequest) -> None:
        """Queue a request."""
        self._stages.offer(request)

    def close_input(self) -> None:
        """Say that no more requests come."""
        self._stages.is_input_closed = True

    def drain(self) -> None:
        """Let the batches in flight end, in later stages too, and start nothing more."""
        self._is_draining = True
        self._stages.drop_first_queue()

    def abort(self, error: RaydiffError) -> None:
        """Drain, then end the run with `error`; the first error stands."""
        self._error = self._error or error
        self.drain()

    def set_places(self, places: Sequence[Place]) -> None:
        """Have these places from now on; a worker whose place goes ends what it holds first."""
        self._stages.check_roles(places)
        self._places.set(places)

    def handle(self, event: Event, now: float) -> None:
        """Take in what a worker reports; reports of replaced workers are ignored."""
        slot = self._places.find(event.worker_id, event.incarnation)
        if slot is None:
            return
        match event:
            case WorkerPlaced():
                slot.placed(now)
            case WorkerReady():
                slot.ready(now)
            case WorkerLeaving():
                slot.leave("drained", event.reason)
            case WorkerFailed():
                self._worker_failed(slot, event)
            case EncodeDone():
                self._encode_done(slot, event.reply, now)
            case DenoiseDone():
                self._denoise_done(slot, event.reply, now)
            case BatchDone():
                self._batch_done(slot, event.reply, now)
            case FlushDone():
                self._flush_done(slot, event.reply, now)
            case InputsLost():
                self._inputs_lost(slot, event.batch_id, now)

    def decide(self, now: float) -> list[Decision]:
        """Return what to do, in order. `now` is any clock that only goes forward, in seconds."""
        self._stop_workers(now)
        if not self._is_draining:
            self._start_workers(now)
        if not self._is_draining:
            self._stages.dispatch(now)
        elif self._stages.has_later_stage:
            self._stages.dispatch_queue(self._stages.last_role, now)
        self._flush(now)
        self._finish()
        decisions = self._decisions.copy()
        self._decisions.clear()
        return decisions

    # -- starts and stops ----------------------------------------------------------------------

    def _start_workers(self, now: float) -> None:
        for role in self._stages.roles:
            demand = self._stages.demand(role)
            if demand and (error := self._places.dead_role(role, now)) is not None:
                self.abort(error)
                return
            self._decisions.extend(self._places.start(role, demand, now))

    def _stop_workers(self, now: float) -> None:
        """Kill who starts, renders or flushes for too long, and who is to leave and may."""
        if not self._is_draining:
            self._decisions.extend(self._places.stop_late(now))
        for slot in self._places:
            if slot.state not in ("pending", "loading", "ready") or slot.stopping is not None:
                continue
            if slot.state == "ready":
                late = self._stages.lateness(slot, now) or open_shards.lateness(slot, now)
                if slot.is_late_again(late is not None) and late is not None:
                    self._decisions.append(stop(slot, "hung", late))
                    continue
            if slot.leaving is not None and slot.may_go:
                self._decisions.append(stop(slot, slot.leaving, slot.leaving_reason))

    # -- deaths --------------------------------------------------------------------------------

    def _worker_failed(self, slot: Slot, event: WorkerFailed) -> None:
        was_starting = slot.state in ("pending", "loading")
        is_blameless = event.cause in ("node", "stopped") or slot.leaving is not None
        role, stopped = slot.place.role, slot.stopping
        held = [job for job in slot.in_flight if len(job)]
        for over in (job for job in slot.in_flight if not len(job)):
            self._stages.let_go(role, over)
        failed = self._breaker.take_back(slot)
        unpublished = [row.request for row in slot.unpublished.values()]
        slot.vacate()
        if event.error is not None:
            self.abort(event.error)
        elif was_starting:
            self._places.start_failed(slot, event, stopped)
        elif not self._is_draining:
            self._stages.offer_again(failed)
            self._shards_lost(unpublished, event.reason)
            if is_blameless or not held:
                self._stages.put_back(role, held)
            else:
                self._crashed(role, held, event.reason)
        self._places.forget_removed(slot)

    def _crashed(self, role: Role, held: list[Any], reason: str) -> None:
        """Blame the oldest job, and put all of them back to be retried alone."""
        head: RowJob | TextJob = held[0]
        verdict = head.blame(self._config.max_crashes)
        for job in held:
            job.is_suspect = True
        if verdict == "again":
            self._stages.put_back(role, held)
        else:
            self._stages.put_back(role, held[1:])
            self._stages.let_go(role, head)
            if verdict == "split":
                begin = "encode" if role == "encode" else self._stages.first_role
                self._stages.put_back(begin, head.split())
            else:
                self._convict(head, reason)
        self._crashes_without_result[role] += 1
        num_crashes = self._crashes_without_result[role]
        if num_crashes >= MAX_CRASHES_WITHOUT_RESULT:
            what = "prompt" if role == "encode" else "image"
            self.abort(
                EngineError(
                    f"workers died {num_crashes} times in a row without one finished {what}; "
                    f"the last: {reason}"
                )
            )

    def _convict(self, job: RowJob | TextJob, reason: str) -> None:
        what = "encoding this row's text" if isinstance(job, TextJob) else "rendering this row"
        error = f"{job.num_crashes} workers died {what}; the last: {reason}"
        if isinstance(job, TextJob):
            self._stages.convict(job, error)
        else:
            self._quarantine(DoomedRow(request=job.batch.requests[0], error=error))

    def _quarantine(self, row: DoomedRow) -> None:
        self._end(_result(row.request, "quarantined", row.error))

    def _shards_lost(self, requests: Sequence[RenderRequest], reason: str) -> None:
        """Let rows that were rendered, but not published, be rendered again."""
        again, failed = self._shards.lost(requests, reason)
        self._stages.offer_again(again)
        for row in failed:
            self._end(_result(row.request, "failed", row.error))

    def _inputs_lost(self, slot: Slot, batch_id: int, now: float) -> None:
        """Let a batch begin anew whose embeddings or latents are gone."""
        job = self._stages.take_done(slot, batch_id, now, is_timed=False)
        if not isinstance(job, RowJob):
            return
        self._stages.lose_embeds(job)
        self._stages.let_go(slot.place.role, job)
        job.num_inputs_lost += 1
        if self._is_draining:
            return
        if job.num_inputs_lost < MAX_INPUTS_LOST:
            self._stages.put_back(self._stages.first_role, [job])
            return
        error = f"the node of its embeddings or latents was lost {MAX_INPUTS_LOST} times"
        for request in job.batch.requests:
            self._end(_result(request, "failed", error))

    # -- replies -------------------------------------------------------------------------------

    def _encode_done(self, slot: Slot, reply: EncodeReply, now: float) -> None:
        job = self._stages.take_done(slot, reply.encode_id, now)
        if not isinstance(job, TextJob):
            return
        self._crashes_without_result["encode"] = 0
        failures = [
            Outcome(row.request, _result(row.request, "failed", row.error))
            for row in self._stages.encoded(job, reply)
        ]
        num_failed = sum(error is not None for error in reply.errors)
        # One text may fail many rows, and is one failure of the worker.
        self._settle(slot, failures, has_success=num_failed < len(job), num_failures=num_failed)

    def _denoise_done(self, slot: Slot, reply: DenoiseReply, now: float) -> None:
        job = self._take_rows(slot, reply, now)
        if job is None:
            return
        rows = {request.request_id: request for request in job.batch.requests}
        denoised = tuple(rows.pop(request_id) for request_id in reply.request_ids)
        results = {result.request_id: result for result in reply.results}
        failures = [
            Outcome(row, results.get(one) or _result(row, "failed", "its worker gave no result"))
            for one, row in rows.items()
        ]
        self._settle(slot, failures, has_success=bool(denoised))
        if denoised:
            job.batch = replace(job.batch, requests=denoised)
            job.denoised = reply
            self._stages.queue("decode", job)
        else:
            self._decisions.append(DropLatents(batch_id=reply.batch_id))

    def _take_rows(self, slot: Slot, reply: DenoiseReply | BatchReply, now: float) -> RowJob | None:
        """Take the rows that a worker is done with, unless they are no longer its own."""
        job = self._stages.take_done(slot, reply.batch_id, now)
        if not isinstance(job, RowJob):
            return None
        slot.batch_sizes[job.key] = reply.max_batch_size
        self._crashes_without_result[slot.place.role] = 0
        self._stages.let_go(slot.place.role, job)
        return job

    def _batch_done(self, slot: Slot, reply: BatchReply, now: float) -> None:
        job = self._take_rows(slot, reply, now)
        if job is None:
            return
        rows = {request.request_id: request for request in job.batch.requests}
        outcomes = _outcomes(reply.results, rows, slot)
        # A row without a result waits in the worker's open shard, or the disk has failed.
        is_kept = reply.disk_error is None
        if is_kept:
            slot.unpublished |= {one: Unpublished(row, now) for one, row in rows.items()}
        self._settle(slot, outcomes, has_success=is_kept and bool(rows))
        if reply.disk_error is not None:
            self.abort(DiskError(reply.disk_error))

    def _flush_done(self, slot: Slot, reply: FlushReply, now: float) -> None:
        flushed, slot.flushing = slot.flushing or (), None
        self._settle(slot, _outcomes(reply.results, {}, slot))
        if reply.disk_error is not None:
            self.abort(DiskError(reply.disk_error))
            return
        missing = [slot.unpublished.pop(one) for one in flushed if one in slot.unpublished]
        if slot.in_flight or self._is_draining:
            # They may lie in a shard that was full before: its batch has not answered yet.
            waiting = {row.request.request_id: Unpublished(row.request, now) for row in missing}
            slot.unpublished |= waiting
            return
        reason = "the shard that was closed does not hold it"
        self._shards_lost([row.request for row in missing], reason)

    def _settle(
        self,
        slot: Slot,
        outcomes: Sequence[Outcome],
        *,
        has_success: bool = False,
        num_failures: int | None = None,
    ) -> None:
        """End rows; failures wait until their worker has a success, or is gone."""
        if has_success or any(one.result.status == "completed" for one in outcomes):
            ended = self._breaker.succeeded(slot) + [one.result for one in outcomes]
        else:
            ended = self._breaker.failed(slot, outcomes, num_failures=num_failures)
        for result in ended:
            self._end(result)

    def _end(self, result: RenderResult) -> None:
        self._shards.ended(result.request_id)
        self._decisions.append(EndRequest(result=result))
        self._breaker.ended(result)
        if not self._is_draining and (error := self._breaker.verdict()) is not None:
            self.abort(error)

    # -- the end -------------------------------------------------------------------------------

    def _flush(self, now: float) -> None:
        """Ask workers to close shards that are to wait no longer."""
        for slot in self._places.of(self._stages.last_role):
            is_able = slot.state == "ready" and slot.stopping is None and slot.flushing is None
            if not is_able or not slot.unpublished:
                continue
            is_last = self._has_nothing_for(slot)
            if not is_last and (self._is_draining or not self._shards.is_due(slot, now)):
                continue
            slot.flushing = tuple(slot.unpublished)
            slot.flush_since = now
            slot.is_flushed = self._is_draining
            self._decisions.append(
                Flush(worker_id=slot.place.worker_id, incarnation=slot.incarnation)
            )

    def _has_nothing_for(self, slot: Slot) -> bool:
        if not self._is_draining:
            return self._stages.has_nothing_for(slot)
        if slot.in_flight or slot.is_flushed:
            return False
        return slot.leaving is not None or not self._stages.has_later_batches

    def _finish(self) -> None:
        """End the run when nothing is left; failures that are still withheld end before it."""
        if self._is_draining:
            is_waiting = self._is_ending()
        else:
            is_waiting = self._stages.has_rows or any(slot.unpublished for slot in self._places)
        if is_waiting:
            return
        for slot in self._places:
            for result in self._breaker.succeeded(slot):
                self._end(result)
        if self._is_draining or self._stages.is_input_closed:
            self._decisions.append(FinishRun(error=self._error))

    def _is_ending(self) -> bool:
        """Whether a run that starts nothing more has something to wait for still."""
        workers = [
            slot for slot in self._places.of(self._stages.last_role) if slot.state == "ready"
        ]
        return (
            self._stages.num_rows_in_flight > 0
            or (bool(workers) and self._stages.has_later_batches)
            or any(slot.flushing is not None for slot in workers)
            or any(slot.unpublished and not slot.is_flushed for slot in workers)
        )


def _outcomes(
    results: Sequence[RenderResult], rows: dict[str, RenderRequest], slot: Slot
) -> list[Outcome]:
    """Take the rows that have a result out of a batch's `rows`, or from where they wait.

    A shard may be closed while its rows' own batch, or an earlier one, is being written still.
    """
    outcomes: list[Outcome] = []
    for result in results:
        request = rows.pop(result.request_id, None)
        if request is None and (row := slot.unpublished.pop(result.request_id, None)) is not None:
            request = row.request
        if request is None:
            request = _take_row(slot, result.request_id)
        if request is not None:
            outcomes.append(Outcome(request, result))
    return outcomes


def _take_row(slot: Slot, request_id: str) -> RenderRequest | None:
    """Take a row out of the batch in flight that has it."""
    jobs: Iterable[RowJob] = slot.in_flight
    for job in jobs:
        if (request := job.take_row(request_id)) is not None:
            return request
    return None


def _result(request: RenderRequest, status: Status, error: str) -> RenderResult:
    return RenderResult(request_id=request.request_id, status=status, error=error)
