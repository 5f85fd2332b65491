"""What takes too long, whose fault a death is, and when failing rows stop a worker or the run."""

import pytest

from raydiff.engine.messages import (
    BatchDone,
    Cause,
    Decision,
    Dispatch,
    Encode,
    FinishRun,
    StartWorker,
    StopWorker,
    WorkerFailed,
    WorkerPlaced,
)
from raydiff.engine.row_times import MIN_TIMEOUT_S, RowTimes
from raydiff.engine.scheduler import Scheduler
from tests.engine.scheduling import (
    encoded,
    ended,
    failure,
    only,
    places,
    ready,
    rendered,
    request,
    scheduler,
    started,
)


def fused(num_workers: int, num_rows: int, **config: object) -> tuple[Scheduler, list[Dispatch]]:
    """A run whose workers are ready, and what they were sent first."""
    rows = [request(number) for number in range(num_rows)]
    machine = scheduler(places(fused=num_workers), rows, **config)
    return machine, only(Dispatch, started(machine))


def gone(sent: Dispatch | StopWorker, cause: Cause, reason: str = "gone") -> WorkerFailed:
    return WorkerFailed(
        worker_id=sent.worker_id, incarnation=sent.incarnation, reason=reason, cause=cause
    )


def replaced(machine: Scheduler, decisions: list[Decision], now: float = 0.0) -> list[Decision]:
    """Let the workers that are asked for become ready at once."""
    for start in only(StartWorker, decisions):
        machine.handle(ready(start.worker_id, start.incarnation), now)
    return decisions + machine.decide(now)


def late(machine: Scheduler, now: float) -> list[StopWorker]:
    """Who is stopped at `now`: what is late is looked at twice."""
    assert not only(StopWorker, machine.decide(now))
    return only(StopWorker, machine.decide(now))


def all_failed(sent: Dispatch, error: str = "no good") -> BatchDone:
    return rendered(sent, [failure(row, error) for row in sent.batch.requests])


# -- start-up --------------------------------------------------------------------------------------


def test_a_worker_has_its_time_to_be_placed_and_again_to_load_its_model() -> None:
    machine = scheduler(places(fused=1), [request(0)], start_timeout_s=10)
    machine.decide(0.0)
    machine.handle(WorkerPlaced(worker_id="fused0", incarnation=1), 9.0)
    assert machine.worker_states == {"fused0": "loading"}
    assert machine.decide(18.9) == []
    (stop,) = late(machine, 19.0)
    assert (stop.kind, "loaded its model" in stop.reason) == ("late", True)


def test_the_others_of_a_role_go_on_without_a_place_that_no_node_takes() -> None:
    machine = scheduler(places(fused=2), [request(n) for n in range(40)], start_timeout_s=10)
    machine.decide(0.0)
    machine.handle(ready("fused1"), 1.0)
    machine.decide(1.0)
    (stop,) = late(machine, 10.0)
    assert (stop.worker_id, stop.kind) == ("fused0", "unplaced")
    machine.handle(gone(stop, "start"), 10.0)
    assert machine.decide(10.1) == []
    assert machine.worker_states == {"fused0": "lost", "fused1": "busy"}


def test_a_role_that_cannot_be_had_ends_the_run_and_is_named() -> None:
    machine = scheduler(places(encode=1, denoise=2, decode=1), [request(0)], start_timeout_s=10)
    machine.decide(0.0)
    for worker_id in ("encode0", "denoise0", "denoise1"):
        machine.handle(ready(worker_id), 1.0)
    machine.decide(1.0)
    (stop,) = late(machine, 10.0)
    machine.handle(gone(stop, "start", "it asked for small_gpu: 1"), 10.0)
    finish = machine.decide(10.1)[-1]
    assert isinstance(finish, FinishRun)
    assert str(finish.error) == "no decode worker could start: it asked for small_gpu: 1"


def test_a_node_that_goes_away_during_a_start_is_no_failed_start() -> None:
    machine = scheduler(places(fused=1), [request(0)])
    for incarnation in range(1, 8):
        (start,) = machine.decide(0.0)
        assert start == StartWorker(worker_id="fused0", incarnation=incarnation, role="fused")
        event = WorkerFailed(
            worker_id="fused0", incarnation=incarnation, reason="gone", cause="node"
        )
        machine.handle(event, 0.0)


# -- blame -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cause", ["node", "stopped"])
def test_a_node_that_goes_away_blames_no_batch(cause: Cause) -> None:
    machine, sent = fused(1, 8)
    for _ in range(20):
        machine.handle(gone(sent[0], cause), 0.0)
        decisions = replaced(machine, machine.decide(0.0))
        # Both are sent again at once: neither is a suspect.
        assert [one.batch.requests for one in only(Dispatch, decisions)] == [
            one.batch.requests for one in sent
        ]
        sent = only(Dispatch, decisions)


@pytest.mark.parametrize("cause", ["process", "hung"])
def test_a_worker_that_dies_at_work_blames_the_head(cause: Cause) -> None:
    machine, sent = fused(1, 8)
    machine.handle(gone(sent[0], cause), 0.0)
    decisions = replaced(machine, machine.decide(0.0))
    assert [one.batch.requests for one in only(Dispatch, decisions)] == [sent[0].batch.requests]


def test_a_worker_is_kept_free_for_a_suspect_when_none_is_idle_and_none_comes() -> None:
    machine, sent = fused(2, 80, start_timeout_s=10, row_timeout_s=1000)
    suspect, other = sent[0], [one for one in sent if one.worker_id == "fused1"]
    machine.handle(gone(suspect, "process"), 0.0)
    machine.decide(0.0)
    (stop,) = late(machine, 10.0)
    machine.handle(gone(stop, "start"), 10.0)
    machine.handle(rendered(other[0]), 10.0)
    assert not only(Dispatch, machine.decide(10.0))
    machine.handle(rendered(other[1]), 10.0)
    (again,) = only(Dispatch, machine.decide(10.0))
    assert (again.worker_id, again.batch.requests) == ("fused1", suspect.batch.requests)


# -- rows that take too long -----------------------------------------------------------------------


def test_the_first_batch_of_a_kind_may_compile() -> None:
    machine, sent = fused(1, 4, start_timeout_s=600)
    assert machine.decide(599.0) == []
    (stop,) = late(machine, 600.0)
    assert stop.kind == "hung"
    assert "4 rows has taken 600 s" in stop.reason
    assert len(sent) == 1


def test_a_batch_may_take_ten_times_the_longest_of_its_kind() -> None:
    machine, (first, second) = fused(1, 8)
    machine.handle(rendered(first), 80.0)
    # 20 s a row: the second batch may take 800 s from when the first one ended.
    assert not late(machine, 879.0)
    (stop,) = late(machine, 880.0)
    machine.handle(gone(stop, "hung"), 880.0)
    decisions = replaced(machine, machine.decide(880.0))
    assert [one.batch.requests for one in only(Dispatch, decisions)] == [second.batch.requests]


def test_a_quick_kind_still_gets_two_minutes() -> None:
    machine, (first, _) = fused(1, 8)
    machine.handle(rendered(first), 0.01)
    assert not late(machine, MIN_TIMEOUT_S)
    assert late(machine, MIN_TIMEOUT_S + 0.02)


def test_row_timeout_s_counts_from_the_first_batch() -> None:
    machine, _ = fused(1, 4, row_timeout_s=2.5)
    assert machine.decide(9.9) == []
    assert late(machine, 10.0)


def test_a_driver_that_was_stopped_finds_the_answer_before_it_kills() -> None:
    machine, (sent,) = fused(1, 4)
    assert machine.decide(5000.0) == []
    machine.handle(rendered(sent), 5000.0)
    assert not only(StopWorker, machine.decide(5000.0))


def test_a_row_that_hangs_its_worker_is_quarantined() -> None:
    machine, sent = fused(1, 1)
    decisions: list[Decision] = []
    for number in range(3):
        (stop,) = late(machine, 1000.0 * (number + 1))
        machine.handle(gone(stop, "hung", "it hung"), 1000.0 * (number + 1))
        decisions = machine.decide(1000.0 * (number + 1))
        replaced(machine, decisions, 1000.0 * (number + 1))
    assert ended(decisions) == {sent[0].batch.requests[0].request_id: "quarantined"}


def test_steps_count_for_a_batchs_time() -> None:
    times = RowTimes("auto", 600.0)
    times.observe("a", num_rows=2, num_steps=8, elapsed_s=80.0)
    assert times.timeout_s("a", num_rows=1, num_steps=4) == 400.0
    assert times.timeout_s("a", num_rows=1, num_steps=100) == 10_000.0
    assert times.timeout_s("b", num_rows=1, num_steps=4) == 600.0


# -- workers on which everything fails -------------------------------------------------------------


def test_failures_are_withheld_until_a_row_of_that_worker_succeeds() -> None:
    machine, (first, second) = fused(1, 8)
    machine.handle(all_failed(first), 0.0)
    assert not ended(machine.decide(0.0))
    assert machine.queue_lengths["rows_withheld"] == 4
    machine.handle(rendered(second), 0.0)
    statuses = list(ended(machine.decide(0.0)).values())
    assert statuses == ["failed"] * 4 + ["completed"] * 4


def test_withheld_failures_come_out_when_nothing_else_is_left() -> None:
    machine, (sent,) = fused(1, 4)
    machine.handle(all_failed(sent), 0.0)
    decisions = machine.decide(0.0)
    assert list(ended(decisions).values()) == ["failed"] * 4
    assert decisions[-1] == FinishRun()


def test_withheld_failures_come_out_when_more_rows_may_come() -> None:
    """A reader may wait for just these rows, if the next ones are equal to them."""
    machine, (sent,) = fused(1, 4, is_closed=False)
    machine.handle(all_failed(sent), 0.0)
    decisions = machine.decide(0.0)
    assert len(ended(decisions)) == 4
    assert not only(FinishRun, decisions)


def test_withheld_failures_come_out_when_the_run_is_interrupted() -> None:
    machine, (first, second) = fused(1, 100)
    machine.handle(all_failed(first), 0.0)
    machine.drain()
    machine.handle(all_failed(second), 0.0)
    decisions = machine.decide(0.0)
    assert list(ended(decisions).values()) == ["failed"] * 8


def test_a_worker_on_which_all_fails_is_retired_and_its_rows_go_to_another() -> None:
    machine, sent = fused(1, 12, max_worker_failures=8)
    for one in sent:
        machine.handle(all_failed(one, "CUDA error: an illegal memory access"), 0.0)
    decisions = machine.decide(0.0)
    (stop,) = only(StopWorker, decisions)
    assert stop.kind == "retired"
    assert "illegal memory access" in stop.reason
    assert not ended(decisions)
    machine.handle(gone(stop, "stopped"), 0.0)
    decisions = replaced(machine, machine.decide(0.0))
    again = only(Dispatch, decisions)
    assert [row.seed for one in again for row in one.batch.requests] == list(range(8))
    # What fails on the second worker too has failed; the others are well.
    machine.handle(all_failed(again[0]), 0.0)
    decisions = machine.decide(0.0)
    assert list(ended(decisions).values()) == ["failed"] * 4
    machine.handle(rendered(again[1]), 0.0)
    assert list(ended(machine.decide(0.0)).values()) == ["completed"] * 4


def test_rows_withheld_on_a_worker_that_dies_are_tried_again() -> None:
    machine, (first, second) = fused(1, 8)
    machine.handle(all_failed(first), 0.0)
    machine.handle(gone(second, "process"), 0.0)
    decisions = replaced(machine, machine.decide(0.0))
    assert not ended(decisions)
    assert machine.queue_lengths["rows_withheld"] == 0
    assert machine.queue_lengths["rows_waiting"] == 4


def test_a_text_that_fails_is_one_failure_of_its_encoder() -> None:
    rows = [request(number, prompt="bad") for number in range(8)]
    machine = scheduler(places(encode=1, denoise_decode=1), rows, max_worker_failures=2)
    (encode,) = only(Encode, started(machine))
    machine.handle(encoded(encode, {"bad": "no such word"}), 0.0)
    decisions = machine.decide(0.0)
    assert not only(StopWorker, decisions)
    assert len(ended(decisions)) == 8


# -- runs in which too much fails ------------------------------------------------------------------


def run_with_failures(num_good: int, num_bad: int) -> FinishRun:
    """A run whose first `num_bad` rows fail; both are multiples of a batch of 4."""
    machine, pending = fused(1, num_good + num_bad, max_worker_failures=1000)
    while True:
        sent = pending.pop(0)
        rows = sent.batch.requests
        is_bad = rows[0].seed < num_bad
        bad = [failure(row, f"error {row.seed % 2}") for row in rows] if is_bad else None
        machine.handle(rendered(sent, bad), 0.0)
        decisions = machine.decide(0.0)
        pending += only(Dispatch, decisions)
        if finish := only(FinishRun, decisions):
            return finish[0]


def test_too_many_failed_rows_end_the_run_and_say_why() -> None:
    said = str(run_with_failures(num_good=192, num_bad=208).error)
    assert "200 of 200 rows failed" in said
    assert "engine.max_failed_percent (50)" in said
    assert "(100 rows): error 0" in said


def test_a_smaller_share_of_failed_rows_is_no_reason_to_stop() -> None:
    assert run_with_failures(num_good=252, num_bad=88).error is None


def test_few_rows_may_all_fail() -> None:
    assert run_with_failures(num_good=0, num_bad=196).error is None
