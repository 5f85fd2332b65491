"""Batcher: what shares a batch, in which order, and that nothing is lost, doubled or starved."""

import random
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from raydiff.batching import Batcher, padded_size
from raydiff.request import BatchKey, RenderBatch, RenderRequest
from raydiff.video_settings import VideoSettings


def request(
    seed: int, *, model: str = "sdxl", height: int = 512, width: int = 512, steps: int = 30
) -> RenderRequest:
    return RenderRequest(
        model=model,
        model_revision="local-1",
        task="txt2img",
        prompt=f"prompt {seed}",
        negative_prompt=None,
        seed=seed,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=7.5,
        guidance_rescale=0.0,
        sampler="euler",
        request_id=f"{seed:032x}",
    )


def seeds(batch: RenderBatch | None) -> list[int]:
    assert batch is not None
    return [request.seed for request in batch.requests]


def batcher_of(*requests: RenderRequest, lookahead: int = 100) -> Batcher:
    batcher = Batcher(lookahead)
    for one in requests:
        batcher.add(one)
    return batcher


def clip(seed: int, **changes: Any) -> RenderRequest:
    settings = VideoSettings(
        **{
            "video_mode": "one_stage",
            "text_encoder": "gemma3",
            "num_frames": 121,
            "frame_rate": 24.0,
            "stg_scale": 1.0,
            "stg_blocks": (29,),
            "modality_scale": 3.0,
            "audio_guidance_scale": 7.0,
            "audio_stg_scale": 1.0,
            "audio_modality_scale": 3.0,
            "audio_guidance_rescale": 0.7,
            **changes,
        }
    )
    return replace(request(seed), task="txt2vid", video=settings)


def test_clips_of_one_length_and_rate_share_batches_whatever_their_guidance() -> None:
    batcher = batcher_of(
        clip(0),
        clip(1, num_frames=97),
        clip(2, frame_rate=24),
        clip(3, stg_blocks=(), stg_scale=0.0, audio_stg_scale=0.0),
        clip(4, frame_rate=25.0),
        request(5),
    )
    batches = [batcher.take(8) for _ in range(4)]
    assert [seeds(batch) for batch in batches] == [[0, 2, 3], [1], [4], [5]]
    assert batches[1] is not None
    assert batches[1].key == BatchKey("sdxl", 512, 512, 97, 24.0)


def test_an_empty_batcher_gives_nothing() -> None:
    batcher = Batcher(4)
    assert batcher.take(2) is None
    assert batcher.take(2, flush=False) is None
    assert len(batcher) == 0
    assert not batcher.is_full


def test_requests_that_are_put_back_go_first_and_in_their_order() -> None:
    batcher = batcher_of(*(request(seed, steps=20 + seed % 2) for seed in range(6)))
    first = batcher.take(4)
    assert first is not None
    batcher.put_back(first.requests)
    assert len(batcher) == 6
    assert seeds(batcher.take(6)) == sorted(seeds(first)) + [
        seed for seed in range(6) if seed not in seeds(first)
    ]


def test_a_batch_is_of_one_model_and_size() -> None:
    batcher = batcher_of(
        request(0),
        request(1, height=768),
        request(2),
        request(3, model="sd21"),
        request(4, height=768),
        request(5, model="sd21"),
        request(6, width=768),
    )
    batches = [batcher.take(2) for _ in range(4)]
    assert [seeds(batch) for batch in batches] == [[0, 2], [1, 4], [3, 5], [6]]
    assert [b.batch_id for b in batches if b] == [0, 1, 2, 3]
    assert batches[1] is not None
    assert batches[1].key == BatchKey("sdxl", 768, 512)
    assert batches[1].model == "sdxl"
    assert len(batcher) == 0


def test_full_batches_go_before_older_partial_ones() -> None:
    batcher = batcher_of(request(0, height=768), *(request(i) for i in range(1, 4)))
    assert seeds(batcher.take(3)) == [1, 2, 3]
    assert seeds(batcher.take(3)) == [0]


def test_partial_batches_wait_for_rows_until_flush_or_a_full_window() -> None:
    batcher = batcher_of(request(0), request(1, height=768), request(2), lookahead=4)
    assert batcher.take(3, flush=False) is None
    batcher.add(request(3, height=1024))
    assert batcher.is_full
    assert seeds(batcher.take(3, flush=False)) == [0, 2]  # the fullest
    assert batcher.take(3, flush=False) is None
    assert seeds(batcher.take(3)) == [1]
    assert seeds(batcher.take(3)) == [3]


def test_an_odd_size_does_not_starve_in_a_full_window() -> None:
    batcher = Batcher(lookahead=8)
    batcher.add(request(0, height=2048))
    for seed in range(1, 200):
        batcher.add(request(seed, height=512 + 8 * (seed % 3)))
        if batcher.is_full:
            batch = batcher.take(16, flush=False)
            if 0 in seeds(batch):
                return
    pytest.fail("the first request was never taken")


def test_the_loaded_model_goes_first_where_it_can() -> None:
    batcher = batcher_of(
        request(0, model="sd21"), request(1, model="sd21"), request(2), request(3), request(4)
    )
    assert seeds(batcher.take(2, prefer_model="sdxl")) == [2, 3]
    # A full batch of another model goes before a partial one of the loaded model.
    assert seeds(batcher.take(2, prefer_model="sdxl")) == [0, 1]
    assert seeds(batcher.take(2, prefer_model="gone")) == [4]


def test_the_size_may_depend_on_the_key() -> None:
    batcher = batcher_of(*(request(i, height=512 if i % 2 else 1024) for i in range(8)))

    def size(key: BatchKey) -> int:
        return 1 if key.height == 1024 else 4

    assert [seeds(batcher.take(size)) for _ in range(5)] == [[0], [1, 3, 5, 7], [2], [4], [6]]


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_of_no_rows_cannot_be_asked_for(size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        batcher_of(request(0)).take(size)


def test_near_step_counts_share_a_batch_and_the_oldest_is_always_in_it() -> None:
    counts = [30, 50, 20, 30, 28, 50, 30, 4]
    batcher = batcher_of(*(request(i, steps=steps) for i, steps in enumerate(counts)))
    assert seeds(batcher.take(4)) == [0, 3, 4, 6]
    assert seeds(batcher.take(3)) == [1, 2, 5]
    assert seeds(batcher.take(4)) == [7]


@pytest.mark.parametrize("flush", [True, False])
@pytest.mark.parametrize("max_batch_size", [1, 3, 8])
def test_everything_is_taken_once_in_the_same_way_every_time(
    flush: bool, max_batch_size: int
) -> None:
    def run() -> list[RenderBatch]:
        rng = random.Random(5)
        batcher, batches, largest = Batcher(lookahead=32), [], 0
        for seed in range(600):
            while batcher.is_full:
                batch = batcher.take(max_batch_size, flush=flush, prefer_model="sdxl")
                assert batch is not None
                batches.append(batch)
            model, steps = rng.choice(["sdxl", "sd21"]), rng.choice([4, 20, 30, 50])
            height, width = rng.choice([512, 768]), rng.choice([512, 768, 1024])
            batcher.add(request(seed, model=model, height=height, width=width, steps=steps))
            largest = max(largest, len(batcher))
        while (batch := batcher.take(max_batch_size)) is not None:
            batches.append(batch)
        assert largest <= 32
        return batches

    batches = run()
    counts = Counter(seed for batch in batches for seed in seeds(batch))
    assert counts == Counter(range(600))
    for batch in batches:
        assert len(batch.requests) <= max_batch_size
        keys = {(r.model, r.height, r.width) for r in batch.requests}
        assert keys == {batch.key[:3]}
    assert run() == batches


def test_a_window_of_mixed_rows_gives_mostly_full_batches() -> None:
    rng = random.Random(11)
    batcher, batches = Batcher(lookahead=256), []
    take = partial(batcher.take, 8, flush=False)
    for seed in range(4000):
        batcher.add(request(seed, height=rng.choice([512, 640, 768, 896, 1024])))
        while (batch := take()) is not None:
            batches.append(batch)
    assert all(len(batch.requests) == 8 for batch in batches)
    assert len(batcher) < 5 * 8


@pytest.mark.parametrize(
    ("num_rows", "padded"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (9, 16), (32, 32), (33, 64)]
)
def test_padded_sizes_are_powers_of_two(num_rows: int, padded: int) -> None:
    assert padded_size(num_rows) == padded


def test_no_rows_have_no_padded_size() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        padded_size(0)
