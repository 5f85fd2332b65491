"""Where a session's time went, told of a small run whose times are known."""

from collections.abc import Callable
from importlib import import_module

import pytest

from raydiff.engine.observers import Observers
from raydiff.engine.summary import SummaryObserver, describe
from raydiff.request import RenderBatch

MakeBatch = Callable[..., RenderBatch]


def test_a_fused_session() -> None:
    observer, other = SummaryObserver(num_write_threads=2), SummaryObserver(num_write_threads=2)
    import_module("run_story").tell_fused(Observers([observer, other]))
    summary = observer.summary(20.0)
    assert other.summary(20.0) == summary
    # Two rows of one pass of two: together they are the pass, however many rows shared each.
    assert summary.stage_s == {"encode": 1.0, "denoise": 8.0, "decode": 2.0, "write": 1.0}
    assert summary.slowest_stage == "denoise"
    assert summary.busy_share == {"fused": pytest.approx(11 / 18, abs=1e-3)}
    assert summary.gpu_busy_share == 0.5
    assert summary.failures == {"not a number": 1, "bad row": 1}
    assert summary.restarts == {"process": 1}
    assert summary.peak_vram_bytes == 3 * 2**30
    assert summary.texts_asked is None
    assert describe(summary) == [
        "Time: encode 1.0 s, denoise 8.0 s, decode 2.0 s, write 1.0 s; slowest: denoise.",
        "Busy: render 61%, GPUs 50% of their time.",
        "GPU memory: 3.0 GiB at the peak.",
        "Workers lost: 1 process.",
        "Rows lost: 1 not a number, 1 bad row.",
    ]


def test_a_split_session_names_the_stage_whose_workers_had_least_to_spare(
    make_batch: MakeBatch,
) -> None:
    observer = SummaryObserver()
    import_module("run_story").tell_split(observer, make_batch(["a", "b", "b"]))
    summary = observer.summary(10.0)
    assert summary.stage_s == {"encode": 4.0, "denoise": 3.0, "decode": 2.0, "write": 0.1}
    # 3 s and 2 s are of one worker's 10 s, 4 s of another's: each stage by itself.
    assert summary.slowest_stage == "encode"
    assert summary.busy_share == {"denoise_decode": 0.5, "encode": 0.4}
    assert (summary.texts_asked, summary.texts_encoded, summary.texts_from_disk) == (6, 1, 1)
    assert "Texts: 1 encoded, 1 from the disk, 6 used." in describe(summary)
    assert "Busy: encode 40%, denoise_decode 50% of their time." in describe(summary)


def test_slow_files_are_the_slowest_stage_only_beyond_all_their_threads() -> None:
    story = import_module("run_story")
    few, many = SummaryObserver(num_write_threads=1), SummaryObserver(num_write_threads=8)
    for observer in (few, many):
        story.tell_fused(observer)
        for _ in range(40):
            observer.ended(story.DONE, 1)
            observer.ended(story.replace_write(story.DONE, 20.0), 1)
    assert few.summary(20.0).slowest_stage == "write"
    assert many.summary(20.0).slowest_stage == "denoise"


def test_a_session_that_did_nothing_has_nothing_to_tell() -> None:
    assert describe(SummaryObserver().summary(5.0)) == []
