"""A run that an older version left: every command reads it, and it goes on."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydiff.config import OutputConfig, RunConfig, load_config
from raydiff.errors import OutputError
from raydiff.output.diff import RunDiff
from raydiff.output.export.export import ExportFormat, export_run
from raydiff.output.failed_rows import FailedRows, drop_failed_rows, find_failed_rows
from raydiff.output.gallery.build import Gallery
from raydiff.output.ledger import Ledger, count_statuses, read_results, read_results_schema
from raydiff.output.metadata_schema import COLUMNS
from raydiff.output.query import query_results
from raydiff.output.row_samples import find_request, sample_requests
from raydiff.output.run_file import Run, start_run
from raydiff.output.sheet.grid import read_grid
from raydiff.output.sheet.sheet import Sheet
from raydiff.output.verify import Verification
from raydiff.request import ManifestRow, RenderRequest, RenderResult, with_request_id
from raydiff.video_settings import VideoSettings
from tests.output.generated_runs import DEFAULTS, write_run
from tests.output.old_runs import NEW_COLUMNS, Age, make_old

NOTE = pa.schema([("note", pa.string())])
NUM_ROWS = 12
CLIP = with_request_id(
    RenderRequest(
        **{**DEFAULTS, "task": "txt2vid", "seed": 99},
        video=VideoSettings(
            video_mode="one_stage",
            text_encoder="random",
            num_frames=9,
            frame_rate=24.0,
            stg_scale=0.0,
            stg_blocks=(2,),
            modality_scale=1.0,
            audio_guidance_scale=1.0,
            audio_stg_scale=0.0,
            audio_modality_scale=1.0,
            audio_guidance_rescale=0.0,
        ),
    )
)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of images, one of which failed, as this version writes it."""
    rows: list[dict[str, Any]] = [
        {"seed": row, "note": f"n{row}", "guidance_scale": 5.0 + row % 2} for row in range(NUM_ROWS)
    ]
    rows[5]["error"] = "out of memory"
    return write_run(
        tmp_path_factory.mktemp("new") / "out", rows, columns=NOTE, commit_every=NUM_ROWS // 2
    )


@pytest.fixture(params=["before clips", "before shards"])
def age(request: pytest.FixtureRequest) -> Age:
    found: Age = request.param
    return found


@pytest.fixture
def old(new: Path, age: Age, tmp_path: Path) -> Path:
    """The same run as an older version left it."""
    return make_old(Path(shutil.copytree(new, tmp_path / "out")), age)


def resume(out: Path, config: RunConfig | None = None) -> Run:
    return start_run(
        out,
        config=config or RunConfig(),
        manifest_uri="prompts.parquet",
        manifest_fingerprint="ab" * 16,
        num_rows=NUM_ROWS,
        models={"sdxl": "0f1e2d"},
    )


def open_ledger(run: Run) -> Ledger:
    return Ledger(run.out_dir, extra_schema=NOTE, config=OutputConfig(), lock=run.lock)


def add_clip(out: Path, row_index: int) -> None:
    """Go on with a run, and add a row that has all the new columns."""
    extra = pa.RecordBatch.from_pylist([{"note": "late"}], NOTE)
    row = ManifestRow(row_index=row_index, image_index=0, request=CLIP, error=None, extra=extra)
    result = RenderResult(
        request_id=CLIP.request_id,
        status="failed",
        error="late",
        duration_s=0.375,
        audio_sample_rate=24_000,
        nfe=8,
    )
    with resume(out) as run:
        ledger = open_ledger(run)
        ledger.add(row, result)
        ledger.commit()


def query(out: Path, sql: str) -> list[dict[str, Any]]:
    with query_results(out, sql) as reader:
        rows: list[dict[str, Any]] = reader.read_all().to_pylist()
    return rows


def test_its_rows_read_as_they_were_the_new_columns_null(new: Path, old: Path, age: Age) -> None:
    assert not set(NEW_COLUMNS[age]) & set(pq.ParquetFile(parts(old)[0]).schema_arrow.names)
    table = read_results(old)
    assert table.schema == read_results(new).schema == read_results_schema(old)
    assert table.schema.names == [*COLUMNS, "note"]
    assert table.drop_columns(list(NEW_COLUMNS[age])) == read_results(new).drop_columns(
        list(NEW_COLUMNS[age])
    )
    names = ["row_index", "image_index", "stg_blocks", "member", "nfe"]
    assert read_results(old, names) == table.select(names)
    assert count_statuses(old) == Counter(completed=NUM_ROWS - 1, failed=1)


def test_the_run_goes_on_and_both_kinds_of_parts_are_one_table(old: Path) -> None:
    before = read_results(old)
    with resume(old) as run:
        ledger = open_ledger(run)
        assert len(ledger) == NUM_ROWS
        first = before.slice(0, 1).to_pylist()[0]
        found = ledger.find(first["request_id"])
        assert found is not None
        assert (found.sha256, found.member, found.nfe) == (first["sha256"], None, None)
    add_clip(old, NUM_ROWS)
    table = read_results(old)
    assert table.slice(0, NUM_ROWS) == before
    (late,) = table.slice(NUM_ROWS).to_pylist()
    assert (late["stg_blocks"], late["nfe"], late["video_mode"]) == ([2], 8, "one_stage")
    assert query(old, "SELECT count(*) AS n, sum(nfe) AS nfe FROM results") == [
        {"n": NUM_ROWS + 1, "nfe": 8}
    ]
    assert query(old, "SELECT DISTINCT stg_blocks[1] AS block FROM results ORDER BY 1") == [
        {"block": 2},
        {"block": None},
    ]


def test_enough_new_parts_are_merged_beside_the_old_ones(old: Path) -> None:
    with resume(old) as run:
        ledger = open_ledger(run)
        for row in range(NUM_ROWS, NUM_ROWS + 40):
            ledger.add(
                ManifestRow(row_index=row, image_index=0, request=CLIP, error=None, extra=None),
                RenderResult(request_id=CLIP.request_id, status="failed", error="late"),
            )
            ledger.commit()
    assert len(parts(old)) < 20
    assert read_results(old)["row_index"].to_pylist() == list(range(NUM_ROWS + 40))


def test_no_setting_of_it_counts_as_changed(old: Path) -> None:
    resume(old).close()
    resume(old, load_config(overrides={"defaults.guidance_rescale": 0.0})).close()
    for key, value in (("defaults.guidance_rescale", 0.7), ("ltx2.mode", "distilled")):
        with pytest.raises(OutputError, match=rf"{key} was .*, now is {value}"):
            resume(old, load_config(overrides={key: value}))


def test_failed_rows_are_dropped_from_it(old: Path) -> None:
    assert find_failed_rows(str(old), FailedRows()).num_rows == 1
    with resume(old) as run:
        assert drop_failed_rows(run, FailedRows()) == 1
        assert open_ledger(run).counts == {
            "completed": NUM_ROWS - 1,
            "failed": 0,
            "quarantined": 0,
        }
    assert 5 not in read_results(old)["row_index"].to_pylist()


@pytest.mark.parametrize("has_new_part", [False, True])
def test_whatever_reads_a_run_reads_it(
    new: Path, old: Path, tmp_path: Path, has_new_part: bool
) -> None:
    if has_new_part:
        add_clip(old, NUM_ROWS)
    assert [problem for problem in Verification(old) if problem.kind != "unknown_row"] == []
    request_id = read_results(old)["request_id"][0].as_py()
    row = find_request(old, request_id[:8])
    assert (row["seed"], row["member"], row["num_threads"]) == (0, None, None)
    sample = sample_requests(old, share=1.0, number=1, seed=0)
    assert sample.num_rows == NUM_ROWS - 1
    formats: tuple[ExportFormat, ...] = ("webdataset", "imagefolder", "hf-parquet")
    for to in formats:
        summary = export_run(old, tmp_path / to, to=to)
        assert (summary.num_samples, summary.problems) == ({"train": NUM_ROWS - 1}, ())
    difference = RunDiff(new, old)
    list(difference)
    assert difference.counts["equal"] == NUM_ROWS - 1
    grid, _ = read_grid(old, x="guidance_scale", y="note")
    assert all(np.asarray(page).size for page in Sheet(old, grid, cell_size=32))
    refreshed = Gallery(old).refresh()
    assert (refreshed.num_rows, refreshed.problems) == (NUM_ROWS + has_new_part, ())


def parts(out: Path) -> list[Path]:
    return sorted((out / "metadata").glob("part-*.parquet"))
