"""The engine on three nodes where workers, a node and the driver die; `raydiff bench chaos` is the
long version."""

from pathlib import Path

import pytest

from raydiff.bench.chaos import ChaosJob, bench_chaos


@pytest.mark.parametrize("is_split", [False, True], ids=["fused", "split"])
def test_each_row_ends_once_whatever_dies(tmp_path: Path, is_split: bool) -> None:
    job = ChaosJob(num_rows=320, row_ms=60, is_split=is_split)
    steps: list[str] = []
    report = bench_chaos(job, tmp_path / "chaos", on_step=steps.append)
    assert (report.completed, report.failed, report.quarantined) == (313, 5, 2)
    assert (report.num_twice, report.num_missing, report.problems) == (0, 0, ())
    assert report.num_killed >= 3
    # A short run feels each death more than a long one: what 6 workers held, and one second's rows.
    assert report.num_renders - report.num_distinct <= 4 * (report.num_killed + 12)
    assert [step.rpartition(": ")[2] for step in steps[1:3]] == ["a node dies", "the driver dies"]
