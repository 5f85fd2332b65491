"""A plan counts what a run would do, and imports neither torch nor ray."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydiff.cli.plan import describe_batches
from raydiff.config import RunConfig
from raydiff.engine.known_models import KnownModels
from raydiff.engine.plan import open_rows, plan
from raydiff.errors import ConfigError, OutputError
from raydiff.manifest.rows import extra_schema, read_rows
from raydiff.output.ledger import Ledger
from raydiff.output.run_file import start_run
from raydiff.request import RenderResult
from raydiff.weights.resolve import resolve_model
from tests.manifest.known_models import LTX2


@pytest.fixture
def config(tmp_path: Path, tiny_sd21: Path) -> RunConfig:
    """Ten rows: two sizes, two equal rows, one bad one."""
    manifest = tmp_path / "manifest.parquet"
    heights = [64, 64, 64, 128, 128, 128, 128, 64, 63, 64]
    seeds = [0, 1, 1, 3, 4, 5, 6, 7, 8, 9]
    table = pa.table({"prompt": ["a cat"] * 10, "height": heights, "seed": seeds})
    pq.write_table(table, manifest)
    return RunConfig.model_validate(
        {
            "manifest": str(manifest),
            "out": str(tmp_path / "out"),
            "model": {"name": str(tiny_sd21)},
            "engine": {"batch_size": 3},
        }
    )


def test_a_plan_counts_rows_requests_and_batches(config: RunConfig) -> None:
    report = plan(config)
    assert (report.num_rows, report.num_images) == (10, 10)
    assert (report.num_distinct, report.num_duplicates, report.num_bad) == (8, 1, 1)
    assert "row 8: height" in report.bad_rows[0]
    assert (report.num_done, report.num_new) == (0, 8)
    sizes = {batch.height: (batch.num_requests, batch.num_batches) for batch in report.batches}
    assert sizes == {64: (4, 2), 128: (4, 2)}
    assert not Path(config.out or "").exists()


def test_a_plan_tells_clips_by_length_and_rate(tmp_path: Path, tiny_sd21: Path) -> None:
    columns = {
        "prompt": ["a fox"] * 6,
        "seed": [1, 2, 3, 4, 5, 6],
        "model": ["ltx2"] * 5 + [str(tiny_sd21)],
        "num_frames": [121, 121, 121, 9, 120, None],
        "frame_rate": [None, 24, 23.976, None, None, None],
    }
    pq.write_table(pa.table(columns), tmp_path / "clips.parquet")
    config = RunConfig.model_validate(
        {"manifest": str(tmp_path / "clips.parquet"), "memory": {"profile": "cpu_only"}}
    )
    infos = {"ltx2": LTX2, str(tiny_sd21): resolve_model(str(tiny_sd21))}
    report = plan(config, models=KnownModels(infos.__getitem__))
    found = {(one.num_frames, one.frame_rate): one.num_requests for one in report.batches}
    assert found == {(121, 24.0): 2, (121, 23.976): 1, (9, 24.0): 1, (None, None): 1}
    sizes = {one.num_frames: one.batch_size for one in report.batches}
    assert sizes[121] <= sizes[9]
    (message,) = report.bad_rows
    assert "num_frames is 120; LTX-2 needs a multiple of 8 and one. Use 113 or 121." in message
    lines = [describe_batches(one) for one in report.batches]
    assert "2 x ltx2 768x512, 121 frames at 24/s, profile cpu_only" in lines[0]
    assert "1 x ltx2 768x512, 121 frames at 23.976/s, profile" in lines[1]
    assert lines[3].endswith(f"1 x {tiny_sd21} 64x64, profile cpu_only")


def test_a_plan_obeys_limit(config: RunConfig) -> None:
    report = plan(config.model_copy(update={"limit": 3}))
    assert (report.num_rows, report.num_distinct, report.num_duplicates) == (3, 2, 1)


def test_a_plan_says_what_is_done(config: RunConfig) -> None:
    finish_rows(config, {1, 4, 8})
    report = plan(config)
    assert report.num_done == 3
    # Row 2 equals row 1, so it needs no rendering either; row 8 is bad.
    assert report.num_new == 6
    with pytest.raises(OutputError, match="another run"):
        plan(config.model_copy(update={"manifest": None, "prompts": ("a dog",)}))


def test_a_plan_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to render"):
        plan(RunConfig())


def finish_rows(config: RunConfig, wanted: set[int]) -> None:
    manifest = open_rows(config)
    info = resolve_model(config.model.name)
    with start_run(
        config.out or "",
        config=config,
        manifest_uri=manifest.uri,
        manifest_fingerprint=manifest.fingerprint,
        num_rows=manifest.num_rows,
        models={config.model.name: info.revision},
    ) as run:
        ledger = Ledger(
            run.out_dir, extra_schema=extra_schema(manifest), config=config.output, lock=run.lock
        )
        for row in read_rows(manifest, config=config, models=lambda name: info):
            if row.row_index in wanted:
                request_id = row.request.request_id if row.request else ""
                ledger.add(row, RenderResult(request_id=request_id, status="failed", error="late"))
        ledger.commit()


def test_a_plan_needs_neither_torch_nor_ray(config: RunConfig) -> None:
    program = (
        "import sys; from raydiff.engine.plan import plan; from raydiff.config import load_config\n"
        "plan(load_config(None, {'manifest': sys.argv[1], 'model.name': sys.argv[2]}))\n"
        "print([name for name in ('torch', 'ray') if name in sys.modules])"
    )
    arguments = [config.manifest or "", config.model.name]
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_batches_of_auto_size_are_those_of_the_profile(config: RunConfig) -> None:
    engine = config.engine.model_copy(update={"batch_size": "auto"})
    report = plan(config.model_copy(update={"engine": engine}))
    sizes = Counter({batch.height: batch.batch_size for batch in report.batches})
    assert sizes[64] >= sizes[128] >= 1
