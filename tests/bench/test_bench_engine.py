"""The engine's benchmark renders real files and reports what it measured."""

from pathlib import Path

from raydiff.bench.engine import bench_engine
from raydiff.output.ledger import read_results


def test_the_engine_is_measured_over_real_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = bench_engine(num_rows=3000, out=out, num_workers=2, batch_size=16, row_ms=0.1)
    assert report.num_rows == 3000
    assert 50 < report.rows_per_s < 100_000
    assert 0 < report.elapsed_s < report.total_s
    # A row takes 0.1 ms and its file longer than that: most of the time is not the rows'.
    assert report.overhead is not None
    assert 0.1 < report.overhead < 1
    assert 50 * 2**20 < report.rss_last_bytes < 2**31
    results = read_results(out)
    assert results["status"].to_pylist() == ["completed"] * 3000
    assert len(list((out / "images").glob("*/*.png"))) == 3000
    # 3,000 prompts differ, so no image stands for another.
    assert len(set(results["sha256"].to_pylist())) == 3000
