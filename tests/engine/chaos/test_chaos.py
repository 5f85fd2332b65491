"""The engine on three nodes where workers, a node and the driver die: the short version of
`raydiff bench chaos`."""

from pathlib import Path

from raydiff.bench.chaos import ChaosJob, bench_chaos


def test_each_row_ends_once_whatever_dies(tmp_path: Path) -> None:
    steps: list[str] = []
    report = bench_chaos(ChaosJob(num_rows=320), tmp_path / "chaos", on_step=steps.append)
    assert (report.completed, report.failed, report.quarantined) == (313, 5, 2)
    assert (report.num_twice, report.num_missing, report.problems) == (0, 0, ())
    assert report.num_killed >= 3
    # A short run feels each death more than a long one: two batches, and those of the last second.
    assert report.num_renders - report.num_distinct <= 8 * (report.num_killed + 12)
    assert [step.rpartition(": ")[2] for step in steps[1:3]] == ["a node dies", "the driver dies"]
