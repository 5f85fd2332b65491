"""Places that come and go, nodes that are drained, and rows that lie in an open shard."""

import pytest

from raydiff.config import EngineConfig
from raydiff.engine.messages import (
    BatchDone,
    BatchReply,
    Cause,
    Dispatch,
    DropLatents,
    Encode,
    FinishRun,
    Flush,
    FlushDone,
    FlushReply,
    Place,
    StartWorker,
    StopWorker,
    WorkerFailed,
    WorkerLeaving,
)
from raydiff.engine.open_shards import EARLY_FLUSH, FLUSH_TIMEOUT_S, MAX_SHARDS_LOST
from raydiff.engine.scheduler import Scheduler
from raydiff.request import RenderRequest
from tests.engine.scheduling import (
    completed,
    denoised,
    encoded,
    ended,
    only,
    places,
    ready,
    rendered,
    request,
    scheduler,
    started,
)

FIXED = Place(worker_id="fixed")
SPOT = Place(worker_id="spot", is_elastic=True)


def rows(number: int) -> list[RenderRequest]:
    return [request(one) for one in range(number)]


def leaving(worker_id: str, incarnation: int = 1) -> WorkerLeaving:
    return WorkerLeaving(worker_id=worker_id, incarnation=incarnation, reason="spot notice")


def gone(worker_id: str, incarnation: int = 1, cause: Cause = "stopped") -> WorkerFailed:
    return WorkerFailed(
        worker_id=worker_id, incarnation=incarnation, reason="it is gone", cause=cause
    )


def stops(machine: Scheduler, now: float) -> list[StopWorker]:
    """Who is stopped at `now`: what is late is looked at twice."""
    return only(StopWorker, machine.decide(now) + machine.decide(now))


# -- elastic places --------------------------------------------------------------------------------


def test_an_elastic_place_waits_for_a_node_while_its_role_has_another_worker() -> None:
    machine = scheduler([FIXED, SPOT], rows(100), start_timeout_s=10, row_timeout_s=10**6)
    machine.decide(0.0)
    machine.handle(ready("fixed"), 1.0)
    assert stops(machine, 1000.0) == []
    assert machine.worker_states == {"fixed": "busy", "spot": "pending"}
    machine.handle(ready("spot"), 2000.0)
    assert {one.worker_id for one in only(Dispatch, machine.decide(2000.0))} == {"spot"}


def test_elastic_places_alone_have_no_more_time_than_others() -> None:
    both = [SPOT, Place(worker_id="spot2", is_elastic=True)]
    machine = scheduler(both, rows(8), start_timeout_s=10)
    machine.decide(0.0)
    stopped = stops(machine, 10.0)
    assert [one.kind for one in stopped] == ["unplaced"] * 2
    for one in stopped:
        machine.handle(gone(one.worker_id, cause="start"), 10.0)
    finish = machine.decide(10.0)[-1]
    assert isinstance(finish, FinishRun)
    assert "no worker could start" in str(finish.error)


def test_a_waiting_elastic_place_keeps_no_other_from_being_filled() -> None:
    machine = scheduler([SPOT], rows(1))
    machine.decide(0.0)
    machine.set_places([SPOT, FIXED])
    assert machine.decide(1.0) == [StartWorker(worker_id="fixed", incarnation=1, role="fused")]


def test_elastic_places_are_filled_last_and_only_for_rows_that_wait() -> None:
    machine = scheduler([SPOT, FIXED], rows(1))
    machine.decide(0.0)
    assert machine.worker_states == {"spot": "empty", "fixed": "pending"}


def test_a_place_may_be_added_while_the_run_goes_on() -> None:
    machine = scheduler([FIXED], rows(100))
    started(machine)
    machine.set_places([FIXED, SPOT])
    (start,) = machine.decide(1.0)
    assert start == StartWorker(worker_id="spot", incarnation=1, role="fused")


def test_a_place_of_another_role_is_refused() -> None:
    machine = scheduler([FIXED])
    with pytest.raises(ValueError, match="this run has: fused"):
        machine.set_places([FIXED, Place(worker_id="d", role="decode")])


def test_the_worker_of_a_removed_place_ends_what_it_holds() -> None:
    machine = scheduler([FIXED, SPOT], rows(100), batches_in_flight=1)
    sent = {one.worker_id: one for one in only(Dispatch, started(machine))}
    machine.set_places([FIXED])
    assert machine.worker_states["spot"] == "leaving"
    assert machine.decide(1.0) == []
    machine.handle(rendered(sent["spot"]), 1.0)
    decisions = machine.decide(1.0)
    assert len(ended(decisions)) == 4
    assert [one.kind for one in only(StopWorker, decisions)] == ["drained"]
    assert not only(Dispatch, decisions)
    machine.handle(gone("spot"), 1.0)
    assert machine.worker_states == {"fixed": "busy"}


def test_reports_about_a_place_that_came_back_are_of_its_new_worker() -> None:
    machine = scheduler([FIXED, SPOT], rows(100), batches_in_flight=1)
    started(machine)
    machine.set_places([FIXED])
    machine.handle(gone("spot", cause="process"), 1.0)
    machine.set_places([FIXED, SPOT])
    assert StartWorker(worker_id="spot", incarnation=2, role="fused") in machine.decide(1.0)
    machine.handle(ready("spot", 1), 1.0)
    assert machine.worker_states["spot"] == "pending"


def test_places_that_are_all_removed_end_the_run_after_what_is_in_flight() -> None:
    machine = scheduler([FIXED], rows(8), batches_in_flight=1)
    (sent,) = only(Dispatch, started(machine))
    machine.set_places([])
    assert machine.decide(1.0) == []
    machine.handle(rendered(sent), 1.0)
    machine.decide(1.0)
    machine.handle(gone("fixed"), 1.0)
    finish = machine.decide(1.0)[-1]
    assert isinstance(finish, FinishRun)
    assert "no place for a worker is left" in str(finish.error)


# -- drained nodes ---------------------------------------------------------------------------------


def test_a_leaving_worker_gets_nothing_new_and_its_place_is_filled_elsewhere() -> None:
    machine = scheduler([FIXED], rows(100))
    first, second = only(Dispatch, started(machine))
    machine.handle(leaving("fixed"), 1.0)
    machine.handle(rendered(first), 1.0)
    assert not only(Dispatch, machine.decide(1.0))
    machine.handle(rendered(second), 1.0)
    decisions = machine.decide(1.0)
    (stop,) = only(StopWorker, decisions)
    assert (stop.kind, stop.reason) == ("drained", "spot notice")
    machine.handle(gone("fixed"), 1.0)
    assert machine.decide(1.0) == [StartWorker(worker_id="fixed", incarnation=2, role="fused")]


def test_a_worker_that_only_starts_leaves_at_once() -> None:
    machine = scheduler([FIXED], rows(100))
    machine.decide(0.0)
    machine.handle(leaving("fixed"), 1.0)
    decisions = machine.decide(1.0)
    assert [one.kind for one in only(StopWorker, decisions)] == ["drained"]
    assert not only(FinishRun, decisions)


@pytest.mark.parametrize("cause", ["node", "process"])
def test_a_leaving_worker_that_dies_blames_nobody(cause: Cause) -> None:
    machine = scheduler([FIXED], rows(8))
    sent = only(Dispatch, started(machine))
    machine.handle(leaving("fixed"), 1.0)
    machine.handle(gone("fixed", cause=cause), 1.0)
    machine.decide(1.0)
    machine.handle(ready("fixed", 2), 1.0)
    again = only(Dispatch, machine.decide(1.0))
    assert [one.batch.requests for one in again] == [one.batch.requests for one in sent]


# -- open shards -----------------------------------------------------------------------------------


class Shards:
    """A run whose worker keeps rendered rows in a shard until it is asked to close it."""

    def __init__(self, num_rows: int, *, is_closed: bool = True, shard_s: float = 600.0) -> None:
        config = EngineConfig(batch_size=4, batches_in_flight=1)
        self.machine = Scheduler([FIXED], config, shard_s=shard_s)
        for row in rows(num_rows):
            self.machine.offer(row)
        if is_closed:
            self.machine.close_input()
        (self.sent,) = only(Dispatch, started(self.machine))

    def render(self, now: float = 0.0) -> None:
        """Answer the batch without a result: its rows wait."""
        self.machine.handle(rendered(self.sent, []), now)

    def flushed(self, numbers: range) -> FlushDone:
        """The answer to a flush: these rows are published."""
        results = tuple(completed(request(one)) for one in numbers)
        return FlushDone(worker_id="fixed", incarnation=1, reply=FlushReply(results=results))

    def next_worker(self, incarnation: int, now: float = 0.0) -> Dispatch:
        """Let the next worker become ready; return what it is sent."""
        self.machine.decide(now)
        self.machine.handle(ready("fixed", incarnation), now)
        (sent,) = only(Dispatch, self.machine.decide(now))
        return sent


def test_rows_without_a_result_end_when_their_shard_is_closed() -> None:
    run = Shards(4)
    run.render()
    assert run.machine.queue_lengths["rows_unpublished"] == 4
    # Nothing is left for this worker: its shard is closed, and the run waits for that.
    assert run.machine.decide(1.0) == [Flush(worker_id="fixed", incarnation=1)]
    assert run.machine.decide(1.0) == []
    run.machine.handle(run.flushed(range(4)), 2.0)
    decisions = run.machine.decide(2.0)
    assert set(ended(decisions).values()) == {"completed"}
    assert decisions[-1] == FinishRun()


def test_results_of_earlier_batches_come_with_a_later_one() -> None:
    run = Shards(8)
    run.render()
    (sent,) = only(Dispatch, run.machine.decide(0.0))
    everything = [completed(request(number)) for number in range(8)]
    run.machine.handle(rendered(sent, everything), 0.0)
    decisions = run.machine.decide(0.0)
    assert len(ended(decisions)) == 8
    assert decisions[-1] == FinishRun()


def test_a_shard_is_closed_when_its_oldest_row_has_waited_long() -> None:
    run = Shards(100, shard_s=30.0)
    run.render(now=5.0)
    (sent,) = only(Dispatch, run.machine.decide(5.0))
    assert not only(Flush, run.machine.decide(34.9))
    assert only(Flush, run.machine.decide(35.0))
    run.machine.handle(rendered(sent, []), 35.5)
    run.machine.handle(run.flushed(range(4)), 36.0)
    decisions = run.machine.decide(36.0)
    assert len(ended(decisions)) == 4
    # What was added while it was being closed lies in the next one.
    assert run.machine.queue_lengths["rows_unpublished"] == 4
    assert not only(Flush, decisions)


def test_a_shard_is_closed_before_its_worker_leaves() -> None:
    run = Shards(100)
    run.render()
    (sent,) = only(Dispatch, run.machine.decide(0.0))
    run.machine.handle(leaving("fixed"), 1.0)
    assert run.machine.decide(1.0) == [Flush(worker_id="fixed", incarnation=1)]
    run.machine.handle(rendered(sent, []), 2.0)
    run.machine.handle(run.flushed(range(4)), 2.0)
    decisions = run.machine.decide(2.0)
    assert not only(StopWorker, decisions)
    assert only(Flush, decisions)
    run.machine.handle(run.flushed(range(4, 8)), 3.0)
    decisions = run.machine.decide(3.0)
    assert [one.kind for one in only(StopWorker, decisions)] == ["drained"]


def test_a_drained_run_closes_its_shards_first() -> None:
    run = Shards(100)
    run.machine.drain()
    run.render()
    assert run.machine.decide(1.0) == [Flush(worker_id="fixed", incarnation=1)]
    run.machine.handle(run.flushed(range(4)), 2.0)
    decisions = run.machine.decide(2.0)
    assert len(ended(decisions)) == 4
    assert decisions[-1] == FinishRun()


def test_a_drained_split_run_closes_a_shard_when_all_is_decoded() -> None:
    same = [request(number, prompt="the same") for number in range(8)]
    machine = scheduler(places(encode=1, denoise=1, decode=1), same)
    (encode,) = only(Encode, started(machine))
    machine.handle(encoded(encode), 0.0)
    first, second = only(Dispatch, machine.decide(0.0))
    machine.handle(denoised(first), 0.0)
    (decode,) = only(Dispatch, machine.decide(0.0))
    machine.drain()
    machine.handle(rendered(decode, []), 0.0)
    assert machine.decide(0.0) == [DropLatents(batch_id=decode.batch.batch_id)]
    machine.handle(denoised(second), 0.0)
    (decode,) = only(Dispatch, machine.decide(0.0))
    machine.handle(rendered(decode, []), 0.0)
    assert only(Flush, machine.decide(0.0))


def test_a_drained_run_waits_for_no_decoder_that_leaves() -> None:
    same = [request(number, prompt="the same") for number in range(8)]
    machine = scheduler(places(encode=1, denoise=1, decode=1), same)
    (encode,) = only(Encode, started(machine))
    machine.handle(encoded(encode), 0.0)
    first, second = only(Dispatch, machine.decide(0.0))
    machine.handle(denoised(first), 0.0)
    (decode,) = only(Dispatch, machine.decide(0.0))
    machine.handle(leaving("decode0"), 0.0)
    machine.drain()
    machine.handle(denoised(second), 0.0)
    machine.handle(rendered(decode, []), 0.0)
    assert only(Flush, machine.decide(0.0))
    results = tuple(completed(row) for row in decode.batch.requests)
    flushed = FlushDone(worker_id="decode0", incarnation=1, reply=FlushReply(results=results))
    machine.handle(flushed, 0.0)
    decisions = machine.decide(0.0)
    assert len(ended(decisions)) == 4
    assert only(StopWorker, decisions)
    machine.handle(gone("decode0"), 0.0)
    assert machine.decide(0.0) == [FinishRun()]


def test_a_run_whose_disk_is_full_asks_once_for_its_shards() -> None:
    run = Shards(100)
    run.render()
    (sent,) = only(Dispatch, run.machine.decide(0.0))
    reply = BatchReply(
        batch_id=sent.batch.batch_id, results=(), max_batch_size=4, disk_error="disk full"
    )
    run.machine.handle(BatchDone(worker_id="fixed", incarnation=1, reply=reply), 1.0)
    assert only(Flush, run.machine.decide(1.0))
    full = FlushDone(
        worker_id="fixed", incarnation=1, reply=FlushReply(results=(), disk_error="disk full")
    )
    run.machine.handle(full, 1.0)
    (finish,) = run.machine.decide(1.0)
    assert isinstance(finish, FinishRun)
    assert str(finish.error) == "disk full"


def test_rows_of_a_dead_workers_shard_are_rendered_again_and_blamed_for_nothing() -> None:
    run = Shards(8)
    run.render()
    only(Dispatch, run.machine.decide(0.0))
    run.machine.handle(gone("fixed", cause="process"), 1.0)
    suspect = run.next_worker(2)
    assert [row.seed for row in suspect.batch.requests] == [4, 5, 6, 7]
    run.machine.handle(rendered(suspect, []), 1.0)
    (again,) = only(Dispatch, run.machine.decide(1.0))
    assert [row.seed for row in again.batch.requests] == [0, 1, 2, 3]


def test_rows_that_were_lost_with_shards_are_published_early_and_fail_in_the_end() -> None:
    run = Shards(4, is_closed=False)
    for number in range(1, MAX_SHARDS_LOST):
        run.render()
        assert bool(only(Flush, run.machine.decide(0.0))) is (number > EARLY_FLUSH)
        run.machine.handle(gone("fixed", number, "node"), 0.0)
        run.sent = run.next_worker(number + 1)
    run.render()
    run.machine.handle(gone("fixed", MAX_SHARDS_LOST, "node"), 0.0)
    assert list(ended(run.machine.decide(0.0)).values()) == ["failed"] * 4


def test_rows_that_a_closed_shard_does_not_hold_are_rendered_again() -> None:
    run = Shards(4)
    run.render()
    run.machine.decide(0.0)
    run.machine.handle(run.flushed(range(3)), 0.0)
    decisions = run.machine.decide(0.0)
    assert len(ended(decisions)) == 3
    (sent,) = only(Dispatch, decisions)
    assert [row.seed for row in sent.batch.requests] == [3]


def test_rows_of_a_batch_in_flight_may_be_published_before_it_answers() -> None:
    run = Shards(100)
    batch = run.sent.batch
    run.machine.handle(run.flushed(range(2)), 1.0)
    assert len(ended(run.machine.decide(1.0))) == 2
    run.machine.handle(rendered(run.sent, [completed(row) for row in batch.requests[2:]]), 1.0)
    assert len(ended(run.machine.decide(1.0))) == 2
    assert run.machine.queue_lengths["rows_unpublished"] == 0


def test_rows_published_before_their_worker_dies_are_not_rendered_again() -> None:
    run = Shards(4)
    run.machine.handle(run.flushed(range(3)), 1.0)
    run.machine.handle(gone("fixed", cause="process"), 1.0)
    assert [row.seed for row in run.next_worker(2).batch.requests] == [3]


def test_a_batch_whose_rows_are_all_published_is_blamed_for_nothing() -> None:
    run = Shards(4)
    run.machine.handle(run.flushed(range(4)), 1.0)
    run.machine.handle(gone("fixed", cause="process"), 1.0)
    decisions = run.machine.decide(1.0)
    assert len(ended(decisions)) == 4
    assert decisions[-1] == FinishRun()


def test_a_row_that_a_closed_shard_lacks_may_come_with_a_batch_in_flight() -> None:
    run = Shards(8, shard_s=30.0)
    run.render()
    (sent,) = only(Dispatch, run.machine.decide(0.0))
    assert only(Flush, run.machine.decide(30.0))
    # The shard was full before it was asked for: the answer of the next batch tells of it.
    run.machine.handle(run.flushed(range(0)), 31.0)
    assert run.machine.decide(31.0) == []
    everything = [completed(request(number)) for number in range(8)]
    run.machine.handle(rendered(sent, everything), 32.0)
    decisions = run.machine.decide(32.0)
    assert len(ended(decisions)) == 8
    assert decisions[-1] == FinishRun()


def test_a_worker_that_never_closes_its_shard_is_hung() -> None:
    run = Shards(4)
    run.render()
    assert only(Flush, run.machine.decide(1.0))
    assert not stops(run.machine, FLUSH_TIMEOUT_S + 0.9)
    (stop,) = stops(run.machine, FLUSH_TIMEOUT_S + 1.0)
    assert stop.kind == "hung"
    run.machine.handle(gone("fixed", cause="hung"), 700.0)
    again = run.next_worker(2, 700.0)
    assert again.batch.requests == run.sent.batch.requests
