"""The ledger benchmark on a small run: what it generates is a run, and each command counts it."""

from pathlib import Path

from raydiff.bench.ledger import bench_ledger


def test_every_command_counts_all_rows_but_the_torn_ones(tmp_path: Path) -> None:
    steps: list[str] = []
    report = bench_ledger(num_rows=70_000, folder=tmp_path, on_step=steps.append)
    # 65,536 + 4,096 + 256 + 7 x 16 rows
    assert (report.num_parts, report.num_torn) == (10, 16)
    assert {one.name: one.num_done for one in report.measurements} == {
        "plan of the manifest": 0,
        "plan of the run": 69_984,
        "status": 69_984,
        "resume": 69_984,
    }
    assert report.is_good, report
    assert len(steps) == 5
