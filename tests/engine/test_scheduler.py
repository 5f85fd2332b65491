"""The windows of workers, and what becomes of a batch whose worker dies. Events in, decisions
out, without Ray."""

from raydiff.config import EngineConfig
from raydiff.engine.messages import (
    BatchDone,
    BatchReply,
    Decision,
    Dispatch,
    FinishRun,
    Place,
    StartWorker,
    StopWorker,
    WorkerFailed,
    WorkerReady,
)
from raydiff.engine.places import MAX_START_FAILURES
from raydiff.engine.scheduler import MAX_CRASHES_WITHOUT_RESULT, Scheduler
from raydiff.errors import DiskError, EngineError, ModelError
from tests.engine import scheduling
from tests.engine.scheduling import completed, ended, only, request


def scheduler(
    num_workers: int = 1, num_rows: int = 0, *, is_closed: bool = True, **config: object
) -> Scheduler:
    """A scheduler with `num_rows` requests; no others come if it `is_closed`."""
    settings = EngineConfig.model_validate({"batch_size": 4, **config})
    result = Scheduler([Place(worker_id=f"w{index}") for index in range(num_workers)], settings)
    for number in range(num_rows):
        result.offer(request(number))
    if is_closed:
        result.close_input()
    return result


def ready(worker_id: str = "w0", incarnation: int = 1) -> WorkerReady:
    return scheduling.ready(worker_id, incarnation)


def failed(worker_id: str = "w0", incarnation: int = 1, reason: str = "killed") -> WorkerFailed:
    return WorkerFailed(worker_id=worker_id, incarnation=incarnation, reason=reason)


def done(
    dispatch: Dispatch, *, max_batch_size: int = 4, disk_error: str | None = None
) -> BatchDone:
    results = [completed(row) for row in dispatch.batch.requests]
    reply = BatchReply(
        batch_id=dispatch.batch.batch_id,
        results=() if disk_error else tuple(results),
        max_batch_size=max_batch_size,
        disk_error=disk_error,
    )
    return BatchDone(worker_id=dispatch.worker_id, incarnation=dispatch.incarnation, reply=reply)


def dispatches(decisions: list[Decision]) -> list[Dispatch]:
    return only(Dispatch, decisions)


def sizes(decisions: list[Decision]) -> list[tuple[str, int]]:
    sent = dispatches(decisions)
    return [(dispatch.worker_id, len(dispatch.batch.requests)) for dispatch in sent]


def test_a_worker_is_started_and_its_window_is_filled() -> None:
    machine = scheduler(num_rows=20)
    assert machine.decide(0.0) == [StartWorker(worker_id="w0", incarnation=1, role="fused")]
    assert machine.decide(0.1) == []
    machine.handle(ready(), 0.0)
    first = machine.decide(0.2)
    assert sizes(first) == [("w0", 4), ("w0", 4)]
    assert machine.decide(0.3) == []
    machine.handle(done(dispatches(first)[0]), 0.0)
    second = machine.decide(0.4)
    assert len(ended(second)) == 4
    assert sizes(second) == [("w0", 4)]


def test_the_window_has_batches_in_flight_batches() -> None:
    machine = scheduler(num_rows=100, batches_in_flight=5)
    machine.decide(0.0)
    machine.handle(ready(), 0.0)
    assert sizes(machine.decide(0.1)) == [("w0", 4)] * 5


def test_no_more_workers_than_rows_are_started() -> None:
    machine = scheduler(num_workers=8, num_rows=3)
    assert len(machine.decide(0.0)) == 3


def test_nothing_is_started_without_rows() -> None:
    assert scheduler(num_workers=8).decide(0.0) == [FinishRun()]


def test_the_last_rows_are_shared_out() -> None:
    machine = scheduler(num_workers=2, num_rows=6, batch_size=8)
    machine.decide(0.0)
    machine.handle(ready("w0"), 0.0)
    machine.handle(ready("w1"), 0.0)
    assert sizes(machine.decide(0.1)) == [("w0", 2), ("w1", 4)]


def test_an_idle_worker_does_not_wait_for_a_full_queue() -> None:
    machine = Scheduler([Place(worker_id="w0")], EngineConfig(batch_size=4))
    for number in range(6):
        machine.offer(request(number))
    machine.decide(0.0)
    machine.handle(ready(), 0.0)
    assert sizes(machine.decide(0.1)) == [("w0", 4)]
    assert machine.wants_rows


def test_the_input_is_not_read_beyond_lookahead() -> None:
    machine = Scheduler([Place(worker_id="w0")], EngineConfig(lookahead=10))
    for number in range(10):
        assert machine.wants_rows
        machine.offer(request(number))
    assert not machine.wants_rows


def test_batches_take_the_size_that_the_worker_reports() -> None:
    machine = scheduler(num_rows=100, batch_size="auto")
    machine.decide(0.0)
    machine.handle(ready(), 0.0)
    first = dispatches(machine.decide(0.1))
    machine.handle(done(first[0], max_batch_size=11), 0.0)
    assert sizes(machine.decide(0.2)) == [("w0", 11)]
    machine.handle(done(first[1], max_batch_size=2), 0.0)
    assert sizes(machine.decide(0.3)) == [("w0", 2)]


def test_a_batch_size_is_learned_per_shape() -> None:
    machine = scheduler(batch_size="auto", is_closed=False)
    for number in range(80):
        machine.offer(request(number, height=64 if number < 40 else 128))
    machine.close_input()
    machine.decide(0.0)
    machine.handle(ready(), 0.0)
    seen: dict[int, list[int]] = {64: [], 128: []}
    pending = dispatches(machine.decide(0.1))
    while pending:
        batch = pending[0].batch
        seen[batch.key.height].append(len(batch.requests))
        machine.handle(done(pending.pop(0), max_batch_size=5 if batch.key.height == 64 else 3), 0.0)
        pending += dispatches(machine.decide(0.2))
    assert 5 in seen[64]
    assert max(seen[64][2:]) <= 5
    assert 3 in seen[128]
    assert sum(seen[64]) == sum(seen[128]) == 40


def test_the_run_finishes_when_all_is_done() -> None:
    machine = scheduler(num_rows=4)
    machine.decide(0.0)
    machine.handle(ready(), 0.0)
    batch = dispatches(machine.decide(0.1))[0]
    machine.handle(done(batch), 0.0)
    decisions = machine.decide(0.2)
    assert len(ended(decisions)) == 4
    assert decisions[-1] == FinishRun()


def crash(machine: Scheduler, incarnation: int, now: float) -> list[Decision]:
    """Kill w0, let its replacement become ready, and return what that one is sent."""
    machine.handle(failed(incarnation=incarnation), 0.0)
    before = machine.decide(now)
    assert StartWorker(worker_id="w0", incarnation=incarnation + 1, role="fused") in before
    machine.handle(ready(incarnation=incarnation + 1), 0.0)
    return before + machine.decide(now)


def test_a_crashed_batch_is_retried_whole_then_split_then_quarantined() -> None:
    machine = scheduler(num_rows=4)
    machine.decide(0.0)
    machine.handle(ready(), 0.0)
    assert sizes(machine.decide(0.1)) == [("w0", 4)]
    assert sizes(crash(machine, 1, 1.0)) == [("w0", 4)]
    assert sizes(crash(machine, 2, 2.0)) == [("w0", 1)]
    assert sizes(crash(machine, 3, 3.0)) == [("w0", 1)]
    third = crash(machine, 4, 4.0)
    assert list(ended(third).values()) == ["quarantined"]
    assert sizes(third) == [("w0", 1)]
    completed: dict[str, str] = {}
    pending = dispatches(third)
    while pending:
        machine.handle(done(pending.pop(0)), 0.0)
        decisions = machine.decide(5.0)
        completed |= ended(decisions)
        pending += dispatches(decisions)
    assert list(completed.values()) == ["completed"] * 3
    assert set(completed) | set(ended(third)) == {request(n).request_id for n in range(4)}


def test_a_batch_behind_the_crashed_one_is_blameless_and_retried_alone() -> None:
    machine = scheduler(num_rows=20)
    machine.decide(0.0)
    machine.handle(ready(), 0.0)
    head, behind = dispatches(machine.decide(0.1))
    retried = dispatches(crash(machine, 1, 1.0))
    assert [sent.batch.requests for sent in retried] == [head.batch.requests]
    machine.handle(done(retried[0]), 0.0)
    alone = dispatches(machine.decide(2.0))
    assert [sent.batch.requests for sent in alone] == [behind.batch.requests]
    # Twice more it may crash: it was not blamed for the first death.
    assert sizes(crash(machine, 2, 3.0)) == [("w0", 4)]
    assert sizes(crash(machine, 3, 4.0)) == [("w0", 1)]


def test_a_batch_that_only_stood_before_a_poison_row_is_never_quarantined() -> None:
    """The head may be written, not rendered, when the next batch kills the worker."""
    machine = scheduler(num_rows=2, batch_size=1)
    innocent, poison = request(0).request_id, request(1).request_id
    statuses: dict[str, str] = {}
    decisions = machine.decide(0.0)
    while not any(isinstance(decision, FinishRun) for decision in decisions):
        statuses |= ended(decisions)
        for decision in decisions:
            if isinstance(decision, StartWorker):
                machine.handle(ready(incarnation=decision.incarnation), 0.0)
        sent = dispatches(decisions)
        if any(one.batch.requests[0].request_id == poison for one in sent):
            machine.handle(failed(incarnation=sent[0].incarnation), 0.0)
        else:
            for one in sent:
                machine.handle(done(one), 0.0)
        decisions = machine.decide(0.0)
    statuses |= ended(decisions)
    assert statuses == {innocent: "completed", poison: "quarantined"}


def test_a_worker_that_dies_idle_blames_nobody() -> None:
    machine = scheduler(num_workers=2, num_rows=4, batches_in_flight=1, is_closed=False)
    machine.decide(0.0)
    machine.handle(ready("w0"), 0.0)
    machine.handle(ready("w1"), 0.0)
    assert sizes(machine.decide(0.1)) == [("w0", 4)]
    machine.handle(failed("w1"), 0.0)
    machine.offer(request(9))
    machine.close_input()
    assert StartWorker(worker_id="w1", incarnation=2, role="fused") in machine.decide(0.2)


def test_replies_of_a_replaced_worker_are_ignored() -> None:
    machine = scheduler(num_rows=4)
    machine.decide(0.0)
    machine.handle(ready(), 0.0)
    stale = dispatches(machine.decide(0.1))[0]
    fresh = dispatches(crash(machine, 1, 1.0))[0]
    machine.handle(done(stale), 0.0)
    machine.handle(failed(incarnation=1), 0.0)
    assert machine.decide(1.1) == []
    machine.handle(done(fresh), 0.0)
    assert len(ended(machine.decide(1.2))) == 4


def test_a_worker_that_cannot_start_ends_the_run_with_its_reason() -> None:
    machine = scheduler(num_workers=2, num_rows=1)
    for attempt in range(1, MAX_START_FAILURES + 1):
        assert StartWorker(worker_id="w0", incarnation=attempt, role="fused") in machine.decide(
            float(attempt)
        )
        machine.handle(failed(incarnation=attempt, reason="no such device"), 0.0)
    (finish,) = machine.decide(9.0)
    assert isinstance(finish, FinishRun)
    assert isinstance(finish.error, EngineError)
    assert "no such device" in str(finish.error)


def test_the_others_go_on_when_one_place_is_given_up() -> None:
    machine = scheduler(num_workers=2, num_rows=100)
    machine.decide(0.0)
    machine.handle(ready("w1"), 0.0)
    for attempt in range(1, MAX_START_FAILURES + 1):
        machine.handle(failed("w0", attempt), 0.0)
        decisions = machine.decide(float(attempt))
    assert not any(isinstance(decision, StartWorker | FinishRun) for decision in decisions)


def test_a_start_that_is_not_placed_in_time_is_stopped_and_not_tried_again() -> None:
    machine = scheduler(num_rows=4, start_timeout_s=10)
    machine.decide(100.0)
    assert machine.decide(109.9) == []
    # A driver that was stopped for long finds its answers only after a first look.
    assert machine.decide(110.0) == []
    (stop,) = machine.decide(110.05)
    assert isinstance(stop, StopWorker)
    assert stop.kind == "unplaced"
    assert machine.decide(110.1) == []
    machine.handle(failed(reason="asked for GPU: 1, the cluster has 0"), 0.0)
    (finish,) = machine.decide(110.2)
    assert isinstance(finish, FinishRun)
    assert "asked for GPU: 1" in str(finish.error)


def test_an_error_that_no_restart_changes_ends_the_run_at_once() -> None:
    machine = scheduler(num_rows=4)
    machine.decide(0.0)
    error = ModelError("tiny: unet is missing")
    machine.handle(WorkerFailed(worker_id="w0", incarnation=1, reason=str(error), error=error), 0.0)
    assert machine.decide(0.1) == [FinishRun(error=error)]


def test_a_full_disk_ends_the_run_after_what_is_in_flight() -> None:
    machine = scheduler(num_rows=100)
    machine.decide(0.0)
    machine.handle(ready(), 0.0)
    first, second = dispatches(machine.decide(0.1))
    machine.handle(done(first, disk_error="/out: no space left"), 0.0)
    assert machine.decide(0.2) == []
    machine.handle(done(second), 0.0)
    decisions = machine.decide(0.3)
    assert len(ended(decisions)) == 4
    finish = decisions[-1]
    assert isinstance(finish, FinishRun)
    assert isinstance(finish.error, DiskError)
    assert "no space left" in str(finish.error)


def test_workers_that_always_die_end_the_run() -> None:
    machine = scheduler(num_rows=100)
    decisions = machine.decide(0.0)
    for incarnation in range(1, MAX_CRASHES_WITHOUT_RESULT + 1):
        machine.handle(ready(incarnation=incarnation), 0.0)
        machine.decide(0.0)
        machine.handle(failed(incarnation=incarnation, reason="segmentation fault"), 0.0)
        decisions = machine.decide(0.0)
    finish = decisions[-1]
    assert isinstance(finish, FinishRun)
    assert "segmentation fault" in str(finish.error)


def test_drain_lets_what_is_in_flight_end_and_starts_nothing() -> None:
    machine = scheduler(num_workers=2, num_rows=100)
    machine.decide(0.0)
    machine.handle(ready("w0"), 0.0)
    first, second = dispatches(machine.decide(0.1))
    machine.drain()
    machine.handle(ready("w1"), 0.0)
    assert not machine.wants_rows
    assert machine.decide(0.2) == []
    machine.handle(done(first), 0.0)
    assert len(ended(machine.decide(0.3))) == 4
    machine.handle(done(second), 0.0)
    decisions = machine.decide(0.4)
    assert len(ended(decisions)) == 4
    assert decisions[-1] == FinishRun()


def test_a_crash_while_draining_ends_the_run() -> None:
    machine = scheduler(num_rows=100)
    machine.decide(0.0)
    machine.handle(ready(), 0.0)
    machine.decide(0.1)
    machine.drain()
    machine.handle(failed(), 0.0)
    assert machine.decide(0.2) == [FinishRun()]
