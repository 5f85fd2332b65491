"""Whole runs of clips with a real, tiny model: killed and continued, in stages, the same files."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydiff.output.ledger import read_results
from raydiff.output.video.info import read_video_info
from tests.cli.command import cli
from tests.engine.waiting import wait_for_rows

PROMPTS = [
    "A tranquil tableau of alley",
    "a toilet, frozen in time",
    "a bird and a cat",
    "A panda drinking coffee in a cafe in Paris, watercolor painting",
]
NUM_ROWS = 2 * len(PROMPTS)


def write_manifest(path: Path) -> Path:
    """Write clips of two lengths, most under guidance, in a known order of batches."""
    rows: dict[str, Any] = {
        "prompt": PROMPTS * 2,
        "seed": range(NUM_ROWS),
        "height": [64] * NUM_ROWS,
        "width": [96] * NUM_ROWS,
        "num_frames": [9, 9, 9, 17] * 2,
        "num_inference_steps": [2] * NUM_ROWS,
        "guidance_scale": [3.0, 1.0] * 4,
    }
    pq.write_table(pa.table({name: list(values) for name, values in rows.items()}), path)
    return path


def test_a_killed_run_is_continued_and_a_split_one_writes_the_same_clips(
    tmp_path: Path, tiny_ltx2: Path
) -> None:
    manifest = write_manifest(tmp_path / "clips.parquet")
    # One clip at a time: sums over more rows are taken in another order.
    options = ["--model", str(tiny_ltx2), "--set", "engine.batch_size=1"]
    options += ["--set", "output.commit_s=0.1", "--set", "output.wav=true"]
    command = ["render", str(manifest), *options]
    whole, split = tmp_path / "whole", tmp_path / "split"
    driver = subprocess.Popen([sys.executable, "-m", "raydiff", *command, "--out", str(whole)])
    wait_for_rows(driver, whole, 2)
    driver.kill()
    driver.wait(30)
    committed = read_results(whole)["file_name"].to_pylist()
    assert len(committed) < NUM_ROWS
    written = {name: (whole / name).stat().st_mtime_ns for name in committed}
    cli(*command, "--out", whole, cwd=tmp_path)
    assert all((whole / name).stat().st_mtime_ns == at for name, at in written.items())
    cli(*command, "--out", split, "--cluster", "local-split", cwd=tmp_path)

    results = read_results(whole).to_pylist()
    assert [row["status"] for row in results] == ["completed"] * NUM_ROWS
    for row, apart in zip(results, read_results(split).to_pylist(), strict=True):
        assert apart["sha256"] == row["sha256"]
        assert apart["nfe"] == row["nfe"] == 8  # the sound is guided in every row
        check_clip(whole / row["file_name"], row)
    for out in (whole, split):
        assert "all is well" in cli("verify", out, cwd=tmp_path).stdout


def check_clip(path: Path, row: dict[str, Any]) -> None:
    """Read a clip back: it has the frames, the rate, the length and the sound of its row."""
    with path.open("rb") as file:
        info = read_video_info(file)
    assert (info.num_frames, info.width, info.height) == (row["num_frames"], 96, 64)
    assert (info.frame_rate, info.audio_sample_rate) == (24, row["audio_sample_rate"])
    assert info.duration_s == row["duration_s"] == row["num_frames"] / 24
    assert info.audio_duration_s is not None
    assert abs(info.audio_duration_s - info.duration_s) < 0.05
    assert info.metadata is not None
    assert info.metadata["prompt"] == row["prompt"]
    assert path.with_suffix(".wav").stat().st_size > 1000
