"""The way of the batches of a run: what waits before each stage, and which worker is sent it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from raydiff.batching import Batcher
from raydiff.config import EngineConfig
from raydiff.engine.encoding import DoomedRow, Encoding
from raydiff.engine.jobs import Job, JobQueue, RowJob, TextJob, take_ready
from raydiff.engine.messages import (
    Decision,
    Dispatch,
    DropEmbeds,
    DropLatents,
    Encode,
    EncodeReply,
    Place,
    Role,
)
from raydiff.engine.places import Places, Slot
from raydiff.engine.row_times import RowTimes
from raydiff.request import BatchKey, RenderRequest

FIRST_BATCH_SIZE = 8
"""Rows of a first batch of a shape, which its worker may split: its reply says how many fit."""

PIPELINES: tuple[tuple[Role, ...], ...] = (
    ("fused",),
    ("encode", "denoise_decode"),
    ("encode", "denoise", "decode"),
)
"""The roles that a run may have, in the order in which a batch passes them."""


class Stages:
    """Keeps a window of batches at each worker, from queues that are bounded stage by stage.

    Rows wait in the batcher. A fused run takes batches from it as workers have room. A split run
    takes them up while the queue before the denoisers has room; there they wait for their texts
    to be encoded, each distinct text once. Denoisers get nothing while the queue before the
    decoders is full. So the slowest stage sets the pace, and what lies in the cluster is bounded.
    """

    def __init__(
        self,
        places: Places,
        roles: Sequence[Role],
        config: EngineConfig,
        *,
        embeds_cache_bytes: int,
        say: Callable[[Decision], None],
        quarantine: Callable[[DoomedRow], None],
    ) -> None:
        """`quarantine` is told of each row whose text kills the workers that encode it."""
        self.roles = tuple(roles)
        self.row_roles = tuple(role for role in roles if role != "encode")
        self.first_role, self.last_role = self.row_roles[0], self.row_roles[-1]
        self.is_input_closed = False
        self._places = places
        self._config = config
        self._say = say
        self._quarantine = quarantine
        self._batcher = Batcher(config.lookahead)
        self._queues: dict[Role, JobQueue[RowJob]] = {role: JobQueue() for role in self.row_roles}
        self._encoding = Encoding(embeds_cache_bytes) if "encode" in roles else None
        self._text_queue: JobQueue[TextJob] = JobQueue()
        self._row_times = RowTimes(config.row_timeout_s, config.start_timeout_s)
        self._next_id = 0
        self._last_model: str | None = None

    # -- what there is -------------------------------------------------------------------------

    @property
    def is_input_full(self) -> bool:
        """Whether enough rows wait."""
        return self._batcher.is_full

    @property
    def has_rows(self) -> bool:
        """Whether any row waits or is in a worker."""
        return bool(
            len(self._batcher) or any(map(len, self._queues.values())) or self.num_rows_in_flight
        )

    @property
    def num_rows_in_flight(self) -> int:
        """Batches of rows that workers hold."""
        return sum(self._num_in_flight(role) for role in self.row_roles)

    @property
    def has_later_stage(self) -> bool:
        """Whether batches pass from worker to worker."""
        return self.first_role != self.last_role

    @property
    def has_later_batches(self) -> bool:
        """Whether a batch that has passed its first stage, or is in it, goes on to the last."""
        return self.has_later_stage and self.num_batches_before(self.last_role) > 0

    @property
    def queue_lengths(self) -> dict[str, int]:
        """Return what waits where."""
        lengths = {"rows_waiting": len(self._batcher)}
        if self._encoding is not None:
            lengths["texts_waiting"] = self._encoding.num_texts_waiting
        for role, queue in self._queues.items():
            lengths[f"batches_waiting_{role}"] = len(queue)
        for role in self.roles:
            lengths[f"in_flight_{role}"] = self._num_in_flight(role)
        return lengths

    def demand(self, role: Role) -> int:
        """Return how much waits for a role, or will: rows not taken up yet, and batches."""
        if role == "encode":
            texts = self._encoding.num_texts_waiting if self._encoding is not None else 0
            return len(self._batcher) + texts + len(self._text_queue)
        return len(self._batcher) + self.num_batches_before(role)

    def num_batches_before(self, role: Role) -> int:
        """Return the batches that have been taken up and not been sent to a role yet."""
        position = self.row_roles.index(role)
        in_flight = sum(self._num_in_flight(earlier) for earlier in self.row_roles[:position])
        return in_flight + sum(len(self._queues[one]) for one in self.row_roles[: position + 1])

    def has_nothing_for(self, slot: Slot) -> bool:
        """Whether a worker of the last role has nothing to do and nothing to come."""
        if slot.in_flight or not self.is_input_closed or len(self._batcher):
            return False
        return self.num_batches_before(self.last_role) == 0

    def lateness(self, slot: Slot, now: float) -> str | None:
        """Say what takes a worker far too long, if its oldest batch does."""
        waited_s = now - slot.head_since
        if not slot.in_flight or waited_s < self._row_times.shortest_s:
            return None
        head: Job = slot.in_flight[0]
        limit_s = self._row_times.timeout_s(_kind(slot, head), **_size(head))
        if waited_s < limit_s:
            return None
        return (
            f"its batch of {len(head)} {'texts' if isinstance(head, TextJob) else 'rows'} has "
            f"taken {waited_s:.0f} s; the limit is {limit_s:.0f} s (engine.row_timeout_s)"
        )

    def _num_in_flight(self, role: Role) -> int:
        return sum(len(slot.in_flight) for slot in self._places.of(role))

    def check_roles(self, places: Sequence[Place]) -> None:
        """Raise ValueError for places that have nothing to do in this run."""
        for place in places:
            if place.role not in self.roles:
                raise ValueError(
                    f"place {place.worker_id} has the role {place.role}; this run has: "
                    f"{', '.join(self.roles)}"
                )

    # -- what comes in -------------------------------------------------------------------------

    def offer(self, request: RenderRequest) -> None:
        """Let a row wait."""
        self._batcher.add(request)

    def offer_again(self, requests: Sequence[RenderRequest]) -> None:
        """Let rows that have been taken up before wait in front of all others."""
        self._batcher.put_back(requests)

    def queue(self, role: Role, job: RowJob, *, in_front: bool = False) -> None:
        """Queue a batch for a role; before its first one, ask for the texts that it needs."""
        job.is_sent = False
        if role == self.first_role:
            job.denoised = None
            if self._encoding is not None:
                self._encoding.release(job)
                for row in self._encoding.begin(job):
                    self._quarantine(row)
        if len(job):
            self._queues[role].add(job, in_front=in_front)

    def put_back(self, role: Role, jobs: Sequence[Any]) -> None:
        """Queue jobs in front of the others of a role."""
        if role == "encode":
            for job in reversed(jobs):
                self._text_queue.add(job, in_front=True)
            return
        for job in reversed(jobs):
            self.queue(role, job, in_front=True)

    def let_go(self, role: Role, job: RowJob | TextJob) -> None:
        """Drop what the cluster holds for a batch that has passed a role, or begins anew."""
        if isinstance(job, TextJob):
            return
        if self._encoding is not None:
            self._encoding.release(job)
        if role == "decode":
            self._say(DropLatents(batch_id=job.batch.batch_id))

    def lose_embeds(self, job: RowJob) -> None:
        """Have the embeddings made anew that a batch was sent with: their node is gone."""
        if self._encoding is not None and (texts := self._encoding.lose(job)):
            self._say(DropEmbeds(texts=texts))

    def encoded(self, job: TextJob, reply: EncodeReply) -> list[DoomedRow]:
        """Take in what became of texts; return the rows whose text could not be encoded."""
        if self._encoding is None:
            return []
        doomed = self._encoding.done(job, reply)
        self._queues[self.first_role].drop_empty()
        return doomed

    def convict(self, job: TextJob, error: str) -> None:
        """Never encode a text again, and quarantine the rows that wait for it."""
        if self._encoding is None:
            return
        for row in self._encoding.convict(job.batch.texts[0], error):
            self._quarantine(row)
        self._queues[self.first_role].drop_empty()

    def drop_first_queue(self) -> None:
        """Drop the batches that wait for their first stage."""
        self._queues[self.first_role].clear()

    def take_done(
        self, slot: Slot, job_id: int, now: float, *, is_timed: bool = True
    ) -> RowJob | TextJob | None:
        """Take a job from the worker that was sent it, and note how long it took."""
        jobs: Iterable[RowJob | TextJob] = slot.in_flight
        job = next((held for held in jobs if _id(held) == job_id), None)
        if job is None:
            return None
        if job is slot.in_flight[0]:
            if is_timed and len(job):
                elapsed_s = now - slot.head_since
                self._row_times.observe(_kind(slot, job), **_size(job), elapsed_s=elapsed_s)
            slot.head_since = now
        slot.in_flight.remove(job)
        return job

    # -- what is sent out ----------------------------------------------------------------------

    def dispatch(self, now: float) -> None:
        """Fill the workers' windows, the last stage first."""
        for role in reversed(self.row_roles):
            self.dispatch_queue(role, now)
        if self._encoding is None:
            self._dispatch_new(now)
            return
        while self._take_up(self._encoding):
            self.dispatch_queue(self.first_role, now)
        self._dispatch_texts(self._encoding, now)
        if texts := self._encoding.evict():
            self._say(DropEmbeds(texts=texts))

    def dispatch_queue(self, role: Role, now: float) -> None:
        """Send the batches that wait: suspects, each to an idle worker, then the others."""
        queue = self._queues[role]
        for slot in self._places.of(role):
            if not self._may_send(role):
                return
            if slot.is_idle and (suspect := take_ready(queue.suspects)) is not None:
                self._send(slot, suspect, now)
        while queue.others and self._may_send(role):
            slots = self._open_slots(role, now)
            if not slots or (job := take_ready(queue.others)) is None:
                return
            self._send(_shortest(slots, job.batch.model), job, now)

    def _may_send(self, role: Role) -> bool:
        """Whether the next stage has room for what this one makes."""
        if role == self.last_role:
            return True
        return len(self._queues[self.last_role]) < self._max_waiting(self.last_role)

    def _max_waiting(self, role: Role) -> int:
        """Return how many batches may wait for a role."""
        num_live = sum(slot.takes_work for slot in self._places.of(role))
        return max(1, self._config.batches_in_flight * num_live)

    def _dispatch_new(self, now: float) -> None:
        """Fused runs: take batches as workers have room, of the size that suits each."""
        while slots := self._open_slots(self.first_role, now):
            slot = _shortest(slots, None)
            batch = self._batcher.take(
                partial(self._fused_batch_size, slot, now),
                prefer_model=slot.model,
                # A busy worker can wait until the rows to come have filled a batch.
                flush=self.is_input_closed or not slot.in_flight,
            )
            if batch is None:
                return
            self._send(slot, RowJob(batch=batch), now)

    def _take_up(self, encoding: Encoding) -> bool:
        """Split runs: let a batch wait for its texts, if there is room; return whether one does."""
        queue, slots = self._queues[self.first_role], self._places.of(self.first_role)
        if encoding.is_full or len(queue) >= self._max_waiting(self.first_role):
            return False
        is_wanted = not len(queue) and any(slot.is_idle for slot in slots)
        batch = self._batcher.take(
            self._split_batch_size,
            prefer_model=self._last_model,
            flush=self.is_input_closed or is_wanted,
        )
        if batch is None:
            return False
        self._last_model = batch.model
        self.queue(self.first_role, RowJob(batch=batch))
        return True

    def _dispatch_texts(self, encoding: Encoding, now: float) -> None:
        """Send texts to be encoded; a suspect goes to an idle worker."""
        queue = self._text_queue
        for slot in self._places.of("encode"):
            if slot.is_idle and queue.suspects:
                self._send(slot, queue.suspects.popleft(), now)
        while slots := self._open_slots("encode", now):
            num_takers = sum(not slot.in_flight for slot in slots) or 1
            job = queue.others.popleft() if queue.others else encoding.take(num_takers)
            if job is None:
                return
            self._send(_shortest(slots, job.model), job, now)

    def _open_slots(self, role: Role, now: float) -> list[Slot]:
        """Return the workers that may be given one more job."""
        reserved = self._reserved(role, now)
        return [
            slot for slot in self._places.of(role) if slot is not reserved and self._has_room(slot)
        ]

    def _reserved(self, role: Role, now: float) -> Slot | None:
        """Return a busy worker that gets nothing new, so that it can soon take a suspect."""
        queue: JobQueue[Any] = self._text_queue if role == "encode" else self._queues[role]
        if not queue.suspects:
            return None
        slots = self._places.of(role)
        if any(self._places.waits_for_work(slot, now) or _is_alone(slot) for slot in slots):
            return None
        busy = [slot for slot in slots if slot.takes_work]
        return min(busy, key=lambda slot: len(slot.in_flight), default=None)

    def _has_room(self, slot: Slot) -> bool:
        if not slot.takes_work or _is_alone(slot):
            return False
        return len(slot.in_flight) < self._config.batches_in_flight

    def _fused_batch_size(self, slot: Slot, now: float, key: BatchKey) -> int:
        size = slot.batch_sizes.get(key, self._first_batch_size)
        if not self.is_input_closed:
            return size
        depth = len(slot.in_flight)
        num_takers = sum(
            (self._places.is_coming(other, now) and depth == 0)
            or (self._has_room(other) and len(other.in_flight) <= depth)
            for other in self._places.of(slot.place.role)
        )
        return min(size, self._fair_share(num_takers))

    def _split_batch_size(self, key: BatchKey) -> int:
        slots = self._places.of(self.first_role)
        known = [slot.batch_sizes[key] for slot in slots if key in slot.batch_sizes]
        size = max(known, default=self._first_batch_size)
        if not self.is_input_closed:
            return size
        return min(size, self._fair_share(sum(slot.takes_work for slot in slots)))

    @property
    def _first_batch_size(self) -> int:
        asked = self._config.batch_size
        return FIRST_BATCH_SIZE if asked == "auto" else asked

    def _fair_share(self, num_takers: int) -> int:
        """Share the last rows out evenly, so that no worker idles while another has a queue."""
        share = -(-len(self._batcher) // max(1, num_takers))
        # Pipelines pad a batch to a power of two: 9 rows would cost what 16 do.
        return 1 << (share.bit_length() - 1)

    def _send(self, slot: Slot, job: RowJob | TextJob, now: float) -> None:
        worker_id, incarnation = slot.place.worker_id, slot.incarnation
        if not slot.in_flight:
            slot.head_since = now
        slot.in_flight.append(job)
        slot.model = job.model
        # The latents of a denoised batch go by its number: it keeps that one to the end.
        if slot.place.role != "decode":
            self._next_id += 1
        if isinstance(job, TextJob):
            job.batch = replace(job.batch, encode_id=self._next_id)
            self._say(Encode(worker_id=worker_id, incarnation=incarnation, batch=job.batch))
            return
        if slot.place.role == self.first_role:
            job.batch = replace(job.batch, batch_id=self._next_id)
        job.is_sent = True
        self._say(
            Dispatch(
                worker_id=worker_id,
                incarnation=incarnation,
                batch=job.batch,
                denoised=job.denoised,
            )
        )


def pipeline_of(places: Sequence[Place]) -> tuple[Role, ...]:
    """Return the roles of a run, in the order in which a batch passes them."""
    roles = {place.role for place in places}
    for pipeline in PIPELINES:
        if roles == set(pipeline):
            return pipeline
    known = "; ".join(", ".join(pipeline) for pipeline in PIPELINES)
    raise ValueError(f"no way leads through the roles {sorted(roles)}. A run has one of: {known}")


def _is_alone(slot: Slot) -> bool:
    """Whether a worker has a suspect, which it is to have to itself."""
    return bool(slot.in_flight) and slot.in_flight[0].is_suspect


def _shortest(slots: Sequence[Slot], prefer_model: str | None) -> Slot:
    """Return the worker with the fewest jobs; of several, one that has the model loaded."""
    return min(slots, key=lambda slot: (len(slot.in_flight), slot.model != prefer_model))


def _id(job: RowJob | TextJob) -> int:
    return job.batch.encode_id if isinstance(job, TextJob) else job.batch.batch_id


def _kind(slot: Slot, job: Any) -> tuple[Role, str | BatchKey]:
    """Return of what kind a job's time is."""
    return slot.place.role, job.model if isinstance(job, TextJob) else job.key


def _size(job: Any) -> dict[str, int]:
    num_steps = 0 if isinstance(job, TextJob) else job.num_steps
    return {"num_rows": max(1, len(job)), "num_steps": num_steps}
