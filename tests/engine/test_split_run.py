"""Whole runs of a real, tiny model in stages: the same files as without."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from raydiff.output.ledger import read_results
from tests.cli.command import cli


def test_split_runs_write_the_files_of_a_fused_run(tmp_path: Path, tiny_sdxl: Path) -> None:
    rows = {
        "prompt": ["a cat", "a dog", "a cat", "a very small house by the sea"],
        "negative_prompt": [None, "blurry", "blurry", None],
        "seed": [1, 2, 3, 4],
        "guidance_scale": [5.0, 5.0, 1.0, 7.5],
    }
    manifest = tmp_path / "manifest.parquet"
    pq.write_table(pa.table(rows), manifest)
    common = [manifest, "--model", tiny_sdxl, "--set", "defaults.num_inference_steps=2"]
    ways = {
        "fused": ["--stages", "fused"],
        "split": ["--stages", "split"],
        "three": ["--cluster", "local-split"],
    }
    hashes = {}
    for name, options in ways.items():
        run = cli("render", *common, "--out", name, *options, cwd=tmp_path)
        hashes[name] = read_results(tmp_path / name)["sha256"].to_pylist()
        if name != "fused":
            assert "Texts: 5 encoded" in run.stdout
    assert hashes["split"] == hashes["fused"]
    assert hashes["three"] == hashes["fused"]
    assert len(set(hashes["fused"])) == 4
