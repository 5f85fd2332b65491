"""The scaling benchmark renders through the whole engine and counts from the first batches on."""

from pathlib import Path

import numpy as np
import pytest

from raydiff.bench.scaling import bench_scaling, steady_rate
from raydiff.errors import EngineError
from raydiff.output.ledger import read_results


def test_a_run_is_rendered_and_its_rate_leaves_the_first_batches_out(
    tiny_sd21: Path, tmp_path: Path
) -> None:
    (report,) = bench_scaling(
        tiny_sd21,
        tmp_path,
        [1],
        images_per_worker=12,
        batch_size=4,
        num_inference_steps=1,
        profile="cpu_only",
    )
    assert (report.num_workers, report.num_images, report.speedup) == (1, 12, 1.0)
    results = read_results(tmp_path / "run-1")
    assert results["status"].to_pylist() == ["completed"] * 12
    finished = np.sort(results["finished_at"].to_numpy()).astype("datetime64[us]").astype(float)
    elapsed_s = (finished[-1] - finished[3]) / 1e6
    assert report.images_per_s == pytest.approx(8 / elapsed_s, rel=0.01)
    with pytest.raises(EngineError, match="1 of 2 workers"):
        steady_rate(tmp_path / "run-1", 2)
