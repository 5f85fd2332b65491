"""Split stages: what is encoded once, which stage waits for which, what a lost node costs."""

import pytest

from raydiff.engine.embeds_cache import EmbedsCache
from raydiff.engine.jobs import RowJob
from raydiff.engine.messages import (
    Dispatch,
    DropEmbeds,
    DropLatents,
    Encode,
    EndRequest,
    FinishRun,
    InputsLost,
    TextKey,
    WorkerFailed,
    texts_of,
)
from raydiff.engine.scheduler import MAX_INPUTS_LOST, Scheduler
from raydiff.request import BatchKey, RenderBatch
from tests.engine.scheduling import (
    denoised,
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


def texts(sent: Encode) -> list[str]:
    return [key.text for key in sent.batch.texts]


def lost(sent: Dispatch) -> InputsLost:
    return InputsLost(
        worker_id=sent.worker_id, incarnation=sent.incarnation, batch_id=sent.batch.batch_id
    )


def killed(worker_id: str, incarnation: int = 1) -> WorkerFailed:
    return WorkerFailed(worker_id=worker_id, incarnation=incarnation, reason="killed")


def ids(sent: Dispatch) -> list[int]:
    return [row.seed for row in sent.batch.requests]


def encoded_machine(
    num_rows: int = 4,
    *,
    prompt: str | None = None,
    embeds_cache_bytes: int = 10**6,
    **config: object,
) -> tuple[Scheduler, list[Dispatch]]:
    """A split run of three stages whose first batches are encoded and sent to the denoiser."""
    rows = [request(number, prompt=prompt) for number in range(num_rows)]
    machine = scheduler(
        places(encode=1, denoise=1, decode=1),
        rows,
        embeds_cache_bytes=embeds_cache_bytes,
        **config,
    )
    decisions = started(machine)
    dispatched: list[Dispatch] = []
    while sent := only(Encode, decisions):
        for one in sent:
            machine.handle(encoded(one), 0.0)
        decisions = machine.decide(0.0)
        dispatched += only(Dispatch, decisions)
    return machine, dispatched


def test_a_batch_passes_every_stage() -> None:
    rows = [request(0), request(1)]
    machine = scheduler(places(encode=1, denoise=1, decode=1), rows)
    (encode,) = only(Encode, started(machine))
    assert texts(encode) == ["prompt 0", "prompt 1"]
    machine.handle(encoded(encode), 0.0)
    (denoise,) = only(Dispatch, machine.decide(0.0))
    assert (denoise.worker_id, ids(denoise), denoise.denoised) == ("denoise0", [0, 1], None)
    reply = denoised(denoise)
    machine.handle(reply, 0.0)
    (decode,) = only(Dispatch, machine.decide(0.0))
    assert decode.worker_id == "decode0"
    assert decode.batch == denoise.batch
    assert decode.denoised == reply.reply
    machine.handle(rendered(decode), 0.0)
    decisions = machine.decide(0.0)
    assert set(ended(decisions).values()) == {"completed"}
    assert only(DropLatents, decisions) == [DropLatents(batch_id=decode.batch.batch_id)]
    assert decisions[-1] == FinishRun()


def test_a_batch_passes_two_stages() -> None:
    machine = scheduler(places(encode=1, denoise_decode=1), [request(0)])
    (encode,) = only(Encode, started(machine))
    machine.handle(encoded(encode), 0.0)
    (sent,) = only(Dispatch, machine.decide(0.0))
    machine.handle(rendered(sent), 0.0)
    decisions = machine.decide(0.0)
    assert not only(DropLatents, decisions)
    assert decisions[-1] == FinishRun()


def test_places_that_no_way_leads_through_are_refused() -> None:
    with pytest.raises(ValueError, match="no way leads through"):
        scheduler(places(encode=1, decode=1))


def test_each_distinct_text_is_encoded_once() -> None:
    rows = [request(n, prompt=f"shared {n % 2}", guidance_scale=5.0) for n in range(40)]
    machine = scheduler(places(encode=2, denoise_decode=1), rows)
    asked: list[str] = []
    pending = started(machine)
    while pending:
        decision = pending.pop(0)
        if isinstance(decision, Encode):
            asked += texts(decision)
            machine.handle(encoded(decision), 0.0)
        elif isinstance(decision, Dispatch):
            machine.handle(rendered(decision), 0.0)
        elif isinstance(decision, FinishRun):
            break
        pending += [] if pending else machine.decide(0.0)
    assert sorted(asked) == ["", "shared 0", "shared 1"]


def test_texts_of_one_checkpoint_are_encoded_together_and_shared_out() -> None:
    rows = [request(number, model="ab"[number % 2]) for number in range(8)]
    machine = scheduler(places(encode=2, denoise_decode=1), rows)
    sent = only(Encode, started(machine))
    assert [one.worker_id for one in sent] == ["encode0", "encode1"]
    assert all(len({key.model for key in one.batch.texts}) == 1 for one in sent)


def test_a_failed_text_fails_the_rows_that_need_it_and_no_others() -> None:
    rows = [request(0), request(1, prompt="bad"), request(2), request(3, prompt="bad")]
    machine = scheduler(places(encode=1, denoise_decode=1), rows)
    (encode,) = only(Encode, started(machine))
    machine.handle(encoded(encode, {"bad": "no such word"}), 0.0)
    decisions = machine.decide(0.0)
    assert ended(decisions) == {rows[1].request_id: "failed", rows[3].request_id: "failed"}
    assert {one.result.error for one in only(EndRequest, decisions)} == {"no such word"}
    assert [ids(one) for one in only(Dispatch, decisions)] == [[0, 2]]


def test_rows_that_fail_to_denoise_are_not_decoded() -> None:
    machine, (sent,) = encoded_machine()
    bad = sent.batch.requests[1]
    machine.handle(denoised(sent, [failure(bad)]), 0.0)
    decisions = machine.decide(0.0)
    assert ended(decisions) == {bad.request_id: "failed"}
    (decode,) = only(Dispatch, decisions)
    assert ids(decode) == [0, 2, 3]
    assert decode.batch.batch_id == sent.batch.batch_id


def test_a_batch_of_which_nothing_is_denoised_ends_there() -> None:
    machine, (sent,) = encoded_machine(num_rows=2)
    machine.handle(denoised(sent, [failure(row) for row in sent.batch.requests]), 0.0)
    decisions = machine.decide(0.0)
    assert only(DropLatents, decisions) == [DropLatents(batch_id=sent.batch.batch_id)]
    assert set(ended(decisions).values()) == {"failed"}
    assert decisions[-1] == FinishRun()


def test_the_queue_before_the_denoisers_is_bounded() -> None:
    machine, sent = encoded_machine(num_rows=100, batches_in_flight=2)
    assert len(sent) == 2
    # Two batches are held by the denoiser, and two wait for it: no more are encoded.
    assert machine.queue_lengths["batches_waiting_denoise"] == 2
    assert machine.queue_lengths["rows_waiting"] == 100 - 4 * 4


def test_denoisers_wait_for_slow_decoders() -> None:
    machine, pending = encoded_machine(num_rows=400, prompt="the same", batches_in_flight=2)
    while pending:
        machine.handle(denoised(pending.pop(0)), 0.0)
        pending += [
            one for one in only(Dispatch, machine.decide(0.0)) if one.worker_id == "denoise0"
        ]
    # The decoder holds two. Two may wait for it, and two were in the denoiser by then.
    assert machine.queue_lengths["in_flight_decode"] == 2
    assert machine.queue_lengths["in_flight_denoise"] == 0
    assert 2 <= machine.queue_lengths["batches_waiting_decode"] <= 4
    assert machine.queue_lengths["rows_waiting"] > 300


def test_batches_have_the_size_that_the_denoisers_report() -> None:
    machine, pending = encoded_machine(num_rows=100, prompt="the same", batch_size="auto")
    sizes: list[int] = []
    while pending:
        sent = pending.pop(0)
        if sent.worker_id == "denoise0":
            sizes.append(len(ids(sent)))
            machine.handle(denoised(sent, max_batch_size=3), 0.0)
        else:
            machine.handle(rendered(sent), 0.0)
        pending += only(Dispatch, machine.decide(0.0))
    # Two were sent and two were waiting before the first reply.
    assert sizes[:4] == [8] * 4
    assert set(sizes[4:-3]) == {3}
    assert sum(sizes) == 100


def test_embeddings_that_nothing_needs_are_dropped_when_there_is_no_room() -> None:
    rows = [request(number) for number in range(3)]
    machine = scheduler(
        places(encode=1, denoise_decode=1), rows, batch_size=1, embeds_cache_bytes=25
    )
    dropped: list[str] = []
    pending = started(machine)
    while pending:
        decision = pending.pop(0)
        if isinstance(decision, Encode):
            machine.handle(encoded(decision, size_bytes=10), 0.0)
        elif isinstance(decision, Dispatch):
            machine.handle(rendered(decision), 0.0)
        elif isinstance(decision, DropEmbeds):
            dropped += [key.text for key in decision.texts]
        elif isinstance(decision, FinishRun):
            break
        pending += [] if pending else machine.decide(0.0)
    assert dropped == ["prompt 0"]


def test_no_batch_is_taken_up_while_others_need_all_the_room_for_embeddings() -> None:
    machine, sent = encoded_machine(num_rows=10, batch_size=1, embeds_cache_bytes=15)
    assert len(sent) == 2
    assert machine.queue_lengths["batches_waiting_denoise"] == 0
    machine.handle(denoised(sent[0]), 0.0)
    assert only(Encode, machine.decide(0.0))


def test_lost_embeddings_are_made_again() -> None:
    machine, (sent,) = encoded_machine(num_rows=2)
    machine.handle(lost(sent), 1.0)
    decisions = machine.decide(1.0)
    (dropped,) = only(DropEmbeds, decisions)
    (encode,) = only(Encode, decisions)
    assert dropped.texts == encode.batch.texts
    machine.handle(encoded(encode), 1.0)
    (again,) = only(Dispatch, machine.decide(1.0))
    assert again.batch.requests == sent.batch.requests
    assert again.batch.batch_id != sent.batch.batch_id


def test_embeddings_made_anew_meanwhile_are_not_dropped_again() -> None:
    machine, (first, second) = encoded_machine(num_rows=8, prompt="the same")
    machine.handle(lost(first), 1.0)
    (encode,) = only(Encode, machine.decide(1.0))
    machine.handle(encoded(encode), 1.0)
    machine.handle(lost(second), 1.0)
    decisions = machine.decide(1.0)
    assert not only(DropEmbeds, decisions)
    assert not only(Encode, decisions)
    assert len(only(Dispatch, decisions)) == 2


def test_lost_latents_are_made_again() -> None:
    machine, (sent,) = encoded_machine(num_rows=2)
    machine.handle(denoised(sent), 0.0)
    (decode,) = only(Dispatch, machine.decide(0.0))
    machine.handle(lost(decode), 1.0)
    decisions = machine.decide(1.0)
    assert only(DropLatents, decisions) == [DropLatents(batch_id=sent.batch.batch_id)]
    assert not only(Encode, decisions)
    (again,) = only(Dispatch, decisions)
    assert (again.worker_id, again.denoised) == ("denoise0", None)


def test_rows_whose_inputs_are_lost_again_and_again_fail() -> None:
    machine, (sent,) = encoded_machine(num_rows=1)
    for _ in range(MAX_INPUTS_LOST - 1):
        machine.handle(lost(sent), 1.0)
        (encode,) = only(Encode, machine.decide(1.0))
        machine.handle(encoded(encode), 1.0)
        (sent,) = only(Dispatch, machine.decide(1.0))
    machine.handle(lost(sent), 1.0)
    decisions = machine.decide(1.0)
    (end,) = only(EndRequest, decisions)
    assert end.result.status == "failed"
    assert f"lost {MAX_INPUTS_LOST} times" in (end.result.error or "")
    assert decisions[-1] == FinishRun()


def test_a_dead_decoder_costs_no_denoising() -> None:
    machine, (first, second) = encoded_machine(num_rows=8)
    machine.handle(denoised(first), 0.0)
    machine.handle(denoised(second), 0.0)
    held = only(Dispatch, machine.decide(0.0))
    assert [one.worker_id for one in held] == ["decode0", "decode0"]
    machine.handle(killed("decode0"), 1.0)
    machine.decide(1.0)
    machine.handle(ready("decode0", 2), 1.0)
    decisions = machine.decide(1.0)
    assert not only(DropLatents, decisions)
    (again,) = only(Dispatch, decisions)
    # The head, alone: the other one follows when it is done.
    assert (again.worker_id, again.batch) == ("decode0", held[0].batch)
    assert again.denoised == held[0].denoised


def test_a_batch_that_kills_two_decoders_begins_anew_row_by_row() -> None:
    machine, (sent,) = encoded_machine(num_rows=2)
    machine.handle(denoised(sent), 0.0)
    machine.decide(0.0)
    for incarnation in (1, 2):
        machine.handle(killed("decode0", incarnation), 1.0)
        decisions = machine.decide(1.0)
        machine.handle(ready("decode0", incarnation + 1), 1.0)
        decisions += machine.decide(1.0)
    assert only(DropLatents, decisions) == [DropLatents(batch_id=sent.batch.batch_id)]
    assert not only(Encode, decisions)
    (single,) = only(Dispatch, decisions)
    assert (single.worker_id, ids(single)) == ("denoise0", [0])


def test_a_text_that_kills_encoders_is_quarantined_with_its_rows() -> None:
    rows = [request(0), request(1, prompt="deadly"), request(2, prompt="deadly")]
    machine = scheduler(places(encode=1, denoise_decode=1), rows, is_closed=False)
    statuses: dict[str, str] = {}
    pending = started(machine)
    for _ in range(100):
        if not pending:
            break
        statuses |= ended(pending)
        for decision in pending:
            if isinstance(decision, Encode) and "deadly" in texts(decision):
                machine.handle(killed("encode0", decision.incarnation), 0.0)
            elif isinstance(decision, Encode):
                machine.handle(encoded(decision), 0.0)
            elif isinstance(decision, Dispatch):
                machine.handle(rendered(decision), 0.0)
        pending = machine.decide(0.0)
        for worker_id, state in machine.worker_states.items():
            if state == "pending":
                start = next(one for one in pending if hasattr(one, "role"))
                machine.handle(ready(worker_id, start.incarnation), 0.0)
                pending += machine.decide(0.0)
    assert statuses == {
        rows[0].request_id: "completed",
        rows[1].request_id: "quarantined",
        rows[2].request_id: "quarantined",
    }
    # It is known from now on: no other encoder dies of it.
    late = request(3, prompt="deadly")
    machine.offer(late)
    machine.close_input()
    decisions = machine.decide(0.0)
    assert ended(decisions) == {late.request_id: "quarantined"}
    assert not only(Encode, decisions)


def test_a_drained_run_decodes_what_is_denoised() -> None:
    machine, (first, second) = encoded_machine(num_rows=80)
    machine.handle(denoised(first), 0.0)
    machine.drain()
    (decode,) = only(Dispatch, machine.decide(0.0))
    assert decode.batch.batch_id == first.batch.batch_id
    machine.handle(rendered(decode), 0.0)
    machine.handle(denoised(second), 0.0)
    (last,) = only(Dispatch, machine.decide(0.0))
    machine.handle(rendered(last), 0.0)
    decisions = machine.decide(0.0)
    assert len(ended(decisions)) == 4
    assert decisions[-1] == FinishRun()


def test_a_drained_run_does_not_wait_for_a_decoder_that_is_gone() -> None:
    machine, (sent,) = encoded_machine(num_rows=4)
    machine.handle(denoised(sent), 0.0)
    machine.handle(killed("decode0"), 0.0)
    machine.drain()
    assert machine.decide(0.0)[-1] == FinishRun()


def test_the_cache_drops_the_least_recently_used_that_nothing_needs() -> None:
    cache = EmbedsCache(20)
    user = RowJob(batch=RenderBatch(batch_id=1, key=BatchKey("m", 8, 8), requests=()))
    a, b, c, d = (TextKey("m", "r", text) for text in "abcd")
    assert [cache.pin(text, user) for text in (a, b, c, d)] == ["absent"] * 4
    for text in (a, b, c):
        cache.store(text, 10, encode_id=1)
    assert cache.pinned_bytes == cache.size_bytes == 30
    assert cache.is_full
    assert cache.evict() == ()
    for text in (a, b, c):
        cache.unpin(text, user)
    assert cache.pin(a, user) == "ready"
    assert cache.evict() == (b,)
    assert [cache.pin(text, user) for text in (a, b, c, d)] == [
        "ready",
        "absent",
        "ready",
        "pending",
    ]
    assert not cache.lose(c, encode_id=2)
    assert cache.lose(c, encode_id=1)
    assert cache.size_bytes == 10


def test_texts_of_a_request_are_the_prompt_and_what_guidance_needs() -> None:
    assert [key.text for key in texts_of(request(1))] == ["prompt 1"]
    assert [key.text for key in texts_of(request(1, guidance_scale=5.0))] == ["prompt 1", ""]
