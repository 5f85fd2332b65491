"""A cluster that is not there: nodes, workers, embeddings and latents, and every way to lose
them, at random. It carries out what the scheduler decides and checks that it is possible."""

import random
from collections import Counter
from dataclasses import dataclass, field

from raydiff.engine.messages import (
    BatchDone,
    BatchReply,
    Cause,
    Decision,
    Dispatch,
    DropEmbeds,
    DropLatents,
    Encode,
    EncodeDone,
    EncodeReply,
    EndRequest,
    FinishRun,
    Flush,
    FlushDone,
    FlushReply,
    InputsLost,
    Place,
    StartWorker,
    StopWorker,
    TextKey,
    WorkerFailed,
    WorkerLeaving,
    WorkerPlaced,
    texts_of,
)
from raydiff.engine.scheduler import Scheduler
from raydiff.errors import RaydiffError
from raydiff.request import RenderRequest, RenderResult
from tests.engine.scheduling import completed, denoised, failure, ready

CAUSES: dict[str, Cause] = {"unplaced": "start", "late": "start", "hung": "hung"}


@dataclass(eq=False)
class Node:
    """Objects and workers live on one, and go with it."""

    is_alive: bool = True
    is_draining: bool = False


@dataclass(eq=False)
class SimulatedWorker:
    """One incarnation of a worker."""

    start: StartWorker
    node: Node | None = None
    is_ready: bool = False
    is_hung: bool = False
    queue: list[Encode | Dispatch] = field(default_factory=list)
    inputs: dict[int, list[Node]] = field(default_factory=dict)
    """By batch_id: the nodes of what the batch needs."""
    open_shard: list[RenderRequest] = field(default_factory=list)
    """Rows that are written, and not published."""
    early: set[str] = field(default_factory=set)
    """Those of them, and of the closed shard, whose batch has not answered yet."""
    closed_shard: list[RenderRequest] = field(default_factory=list)
    """Rows that are published, as the next answer to a batch will tell."""
    is_flushing: bool = False


@dataclass(kw_only=True)
class Weather:
    """What goes wrong. Poison and bad items do so always; the rest is chance."""

    poison: dict[str, str] = field(default_factory=dict)
    """request_id: the role in which it kills its worker."""
    hangs: frozenset[str] = frozenset()
    """Poison that hangs its worker instead."""
    bad_rows: frozenset[str] = frozenset()
    bad_texts: frozenset[str] = frozenset()
    deadly_texts: frozenset[str] = frozenset()
    crash_chance: float = 0.0
    """Of each batch; no row meets it twice."""
    hang_chance: float = 0.0
    num_node_deaths: int = 0
    num_start_failures: int = 0
    shard_rows: int | None = None
    """Rows of a shard; None: a file for each row."""
    broken_worker: str | None = None
    """A place on which every row fails."""
    unplaceable: frozenset[str] = frozenset()
    """Places that no node ever has room for."""
    elastic: list[Place] = field(default_factory=list)
    """Places that come and go while the run goes on, beside those of its start."""
    num_place_changes: int = 0


class SimulatedCluster:
    """Runs a scheduler to its end."""

    def __init__(
        self, machine: Scheduler, of: list[Place], weather: Weather, rng: random.Random
    ) -> None:
        self.machine = machine
        self.places = of
        self.weather = weather
        self.rng = rng
        self.now = 0.0
        self.nodes = [Node(), Node(), Node()]
        self.workers: dict[str, SimulatedWorker] = {}
        self.embeds: dict[TextKey, Node] = {}
        self.latents: dict[int, Node] = {}
        self.unlucky: set[str] = set()
        self.ends: Counter[tuple[str, str]] = Counter()
        self.renders: Counter[str] = Counter()
        self.encodes: Counter[TextKey] = Counter()
        self.num_latents_most = 0

    def run(self, max_steps: int = 20_000) -> RaydiffError | None:
        """Return the error that ends the run, None where there is none."""
        finish = self.advance(max_steps)
        states, lengths = self.machine.worker_states, self.machine.queue_lengths
        assert finish is not None, f"the run does not end: {states}, {lengths}"
        return finish.error

    def advance(self, num_steps: int) -> FinishRun | None:
        """Run for so many steps, or to the end; return that."""
        for _ in range(num_steps):
            self.now += 0.1
            for decision in self.machine.decide(self.now):
                if isinstance(decision, FinishRun):
                    return decision
                self.carry_out(decision)
            self.num_latents_most = max(self.num_latents_most, len(self.latents))
            self.something_happens()
        return None

    # -- decisions -----------------------------------------------------------------------------

    def carry_out(self, decision: Decision) -> None:
        """Do as a driver and a cluster would."""
        match decision:
            case StartWorker():
                self.workers[decision.worker_id] = SimulatedWorker(decision)
            case StopWorker():
                cause = CAUSES.get(decision.kind, "stopped")
                self.fail(self.worker(decision), cause, decision.reason)
            case Encode():
                self.encodes.update(decision.batch.texts)
                self.worker(decision).queue.append(decision)
            case Dispatch():
                self.send(decision)
            case Flush():
                worker = self.worker(decision)
                assert not worker.is_flushing
                worker.is_flushing = True
            case DropEmbeds():
                for text in decision.texts:
                    del self.embeds[text]
            case DropLatents():
                del self.latents[decision.batch_id]
            case EndRequest():
                self.ends[decision.result.request_id, decision.result.status] += 1

    def worker(self, decision: StopWorker | Encode | Dispatch | Flush) -> SimulatedWorker:
        worker = self.workers[decision.worker_id]
        assert worker.start.incarnation == decision.incarnation
        assert worker.is_ready or isinstance(decision, StopWorker)
        return worker

    def send(self, sent: Dispatch) -> None:
        worker = self.worker(sent)
        role, batch = worker.start.role, sent.batch
        assert batch.requests
        if role == "decode":
            assert sent.denoised is not None
            assert {row.request_id for row in batch.requests} <= set(sent.denoised.request_ids)
            worker.inputs[batch.batch_id] = [self.latents[batch.batch_id]]
        elif role != "fused":
            # The references must be there: a KeyError is a text that was never encoded.
            worker.inputs[batch.batch_id] = [
                self.embeds[text] for row in batch.requests for text in texts_of(row)
            ]
        worker.queue.append(sent)

    # -- events --------------------------------------------------------------------------------

    def something_happens(self) -> None:
        """Pick one of the things that can happen next."""
        rng = self.rng
        starting = [
            one
            for one in self.workers.values()
            if not one.is_ready and one.start.worker_id not in self.weather.unplaceable
        ]
        busy = [one for one in self.workers.values() if one.queue and not one.is_hung]
        flushing = [one for one in self.workers.values() if one.is_flushing and not one.is_hung]
        if self.weather.shard_rows and busy and rng.random() < 0.3:
            self.write_early(rng.choice(busy))
        if self.weather.num_node_deaths and rng.random() < 0.03:
            self.node_goes()
        elif self.weather.num_place_changes and rng.random() < 0.05:
            self.weather.num_place_changes -= 1
            num_elastic = rng.randint(0, len(self.weather.elastic))
            elastic = rng.sample(self.weather.elastic, num_elastic)
            self.machine.set_places([*self.places, *elastic])
        elif flushing and rng.random() < 0.3:
            self.flush(rng.choice(flushing))
        elif busy and (not starting or rng.random() < 0.7):
            self.finish_head(rng.choice(busy))
        elif starting:
            self.come_up(rng.choice(starting))
        elif flushing:
            self.flush(rng.choice(flushing))
        else:
            # Nobody answers any more: all that is left hangs, or has no room on any node.
            self.now += 10_000.0

    def come_up(self, worker: SimulatedWorker) -> None:
        worker_id, incarnation = worker.start.worker_id, worker.start.incarnation
        if self.weather.num_start_failures and self.rng.random() < 0.2:
            self.weather.num_start_failures -= 1
            self.fail(worker, "process", "out of memory")
        elif worker.node is None:
            worker.node = self.rng.choice([one for one in self.nodes if not one.is_draining])
            self.machine.handle(
                WorkerPlaced(worker_id=worker_id, incarnation=incarnation), self.now
            )
        else:
            worker.is_ready = True
            self.machine.handle(ready(worker_id, incarnation), self.now)

    def fail(self, worker: SimulatedWorker, cause: Cause, reason: str) -> None:
        del self.workers[worker.start.worker_id]
        event = WorkerFailed(
            worker_id=worker.start.worker_id,
            incarnation=worker.start.incarnation,
            reason=reason,
            cause=cause,
        )
        self.machine.handle(event, self.now)
        # Every call that a dead worker had fails, and each says so.
        self.machine.handle(event, self.now)

    def node_goes(self) -> None:
        """A node is drained first, and then, or at once, is gone; another one comes."""
        node = self.rng.choice(self.nodes)
        on_node = [one for one in self.workers.values() if one.node is node]
        if not node.is_draining and self.rng.random() < 0.5:
            node.is_draining = True
            for worker in on_node:
                event = WorkerLeaving(
                    worker_id=worker.start.worker_id,
                    incarnation=worker.start.incarnation,
                    reason="spot instance is taken back",
                )
                self.machine.handle(event, self.now)
            self.nodes.append(Node())
            return
        self.weather.num_node_deaths -= 1
        node.is_alive = False
        self.nodes.remove(node)
        if sum(not other.is_draining for other in self.nodes) < 3:
            self.nodes.append(Node())
        for worker in on_node:
            self.fail(worker, "node", "its node is gone")

    def finish_head(self, worker: SimulatedWorker) -> None:
        sent = worker.queue[0]
        if self.is_fatal(worker, sent):
            return
        worker.queue.pop(0)
        if isinstance(sent, Encode):
            self.encoded(worker, sent)
        elif any(not node.is_alive for node in worker.inputs.pop(sent.batch.batch_id, [])):
            event = InputsLost(
                worker_id=sent.worker_id,
                incarnation=sent.incarnation,
                batch_id=sent.batch.batch_id,
            )
            self.machine.handle(event, self.now)
        elif worker.start.role == "denoise":
            failures = [failure(row) for row in sent.batch.requests if self.is_bad(worker, row)]
            self.latents[sent.batch.batch_id] = self.node_of(worker)
            size = self.rng.randint(1, 8)
            self.machine.handle(denoised(sent, failures, max_batch_size=size), self.now)
        else:
            self.rendered(worker, sent)

    def is_fatal(self, worker: SimulatedWorker, sent: Encode | Dispatch) -> bool:
        """Whether the worker dies of its batch, or hangs."""
        weather, role = self.weather, worker.start.role
        if isinstance(sent, Encode):
            items = {key.text for key in sent.batch.texts}
            poison = items & weather.deadly_texts
        else:
            items = {row.request_id for row in sent.batch.requests}
            poison = {one for one in items if weather.poison.get(one) == role}
        is_chance = not items & self.unlucky and self.rng.random() < weather.crash_chance
        is_hang = not items & self.unlucky and self.rng.random() < weather.hang_chance
        if is_chance or is_hang:
            self.unlucky |= items
        if poison & weather.hangs or (is_hang and not poison):
            worker.is_hung = True
        elif poison or is_chance:
            self.fail(worker, "process", "killed")
        return bool(poison) or is_chance or is_hang

    def encoded(self, worker: SimulatedWorker, sent: Encode) -> None:
        texts = sent.batch.texts
        bad = [key.text in self.weather.bad_texts for key in texts]
        for key, is_bad in zip(texts, bad, strict=True):
            if not is_bad:
                self.embeds[key] = self.node_of(worker)
        reply = EncodeReply(
            encode_id=sent.batch.encode_id,
            sizes=tuple(0 if one else 10 for one in bad),
            errors=tuple("no such word" if one else None for one in bad),
            encode_s=0.1,
        )
        event = EncodeDone(worker_id=sent.worker_id, incarnation=sent.incarnation, reply=reply)
        self.machine.handle(event, self.now)

    def write_early(self, worker: SimulatedWorker) -> None:
        """Write a row whose batch is not done; perhaps it fills the shard."""
        sent = worker.queue[0]
        if isinstance(sent, Encode) or worker.start.role == "denoise":
            return
        row = self.rng.choice(sent.batch.requests)
        is_lost = any(not node.is_alive for node in worker.inputs.get(sent.batch.batch_id, []))
        is_poison = row.request_id in self.weather.poison or is_lost
        if row.request_id not in worker.early and not is_poison and not self.is_bad(worker, row):
            worker.early.add(row.request_id)
            self.write(worker, row)

    def write(self, worker: SimulatedWorker, row: RenderRequest) -> None:
        self.renders[row.request_id] += 1
        worker.open_shard.append(row)
        if len(worker.open_shard) >= (self.weather.shard_rows or 1):
            worker.closed_shard += self.close_shard(worker)

    def rendered(self, worker: SimulatedWorker, sent: Dispatch) -> None:
        results: list[RenderResult] = []
        for row in sent.batch.requests:
            if self.is_bad(worker, row):
                results.append(failure(row))
            elif row.request_id not in worker.early:
                self.write(worker, row)
            worker.early.discard(row.request_id)
        results += [completed(row) for row in worker.closed_shard]
        worker.closed_shard = []
        reply = BatchReply(
            batch_id=sent.batch.batch_id,
            results=tuple(results),
            max_batch_size=self.rng.randint(1, 8),
        )
        event = BatchDone(worker_id=sent.worker_id, incarnation=sent.incarnation, reply=reply)
        self.machine.handle(event, self.now)

    def flush(self, worker: SimulatedWorker) -> None:
        worker.is_flushing = False
        reply = FlushReply(results=tuple(completed(row) for row in self.close_shard(worker)))
        event = FlushDone(
            worker_id=worker.start.worker_id, incarnation=worker.start.incarnation, reply=reply
        )
        self.machine.handle(event, self.now)

    def close_shard(self, worker: SimulatedWorker) -> list[RenderRequest]:
        rows, worker.open_shard = worker.open_shard, []
        return rows

    def is_bad(self, worker: SimulatedWorker, row: RenderRequest) -> bool:
        is_broken = worker.start.worker_id == self.weather.broken_worker
        return is_broken or row.request_id in self.weather.bad_rows

    def node_of(self, worker: SimulatedWorker) -> Node:
        assert worker.node is not None
        return worker.node
