"""A run in an object store: what was committed stays, once, through faults, merges and resumes."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pytest

from raydiff.config import OutputConfig, RunConfig
from raydiff.errors import EngineError, OutputError
from raydiff.output.ledger import Ledger, count_statuses, read_results, read_results_schema
from raydiff.output.progress import ProgressFile, read_progress
from raydiff.output.query import query_results
from raydiff.output.run_file import Run, read_run, start_run
from raydiff.output.scores import FileScore, ScoreTable, read_scores
from raydiff.output.verify import Verification
from raydiff.output.writer import Writer
from tests.s3_server import FaultyS3

NO_COLUMNS = pa.schema([])


@pytest.fixture
def begin(s3: FaultyS3) -> Iterator[Callable[..., Run]]:
    """Start or resume a run in an object store; every run is closed after the test."""
    uri = s3.new_uri()
    runs: list[Run] = []

    def begin_run(**changes: Any) -> Run:
        values: dict[str, Any] = {
            "config": RunConfig(),
            "manifest_uri": f"{uri}.parquet",
            "manifest_fingerprint": "ab" * 16,
            "num_rows": 100,
            "models": {"sdxl": "0f1e2d"},
        }
        runs.append(start_run(uri, **{**values, **changes}))
        return runs[-1]

    yield begin_run
    s3.reset()
    for run in runs:
        run.close()


def open_ledger(run: Run) -> Ledger:
    return Ledger(run.out, extra_schema=NO_COLUMNS, config=OutputConfig(), lock=run.lock)


def render(run: Run, ledger: Ledger, seeds: range, make: Any, pixels: Callable[[int], Any]) -> None:
    writer = Writer(run.out, OutputConfig())
    for seed in seeds:
        request = make.request(seed)
        result = make.result(request, finished_at=time.time())
        for durable in writer.write(request, pixels(seed), result):
            ledger.add(make.row(request, seed), durable)
        ledger.commit()


def test_rows_stay_through_faults_merges_and_resumes(
    begin: Callable[..., Run], s3: FaultyS3, make: Any, random_pixels: Any
) -> None:
    run = begin()
    ledger = open_ledger(run)
    s3.breaks = lambda method, path: len(s3.requests) % 7 == 0
    s3.faults = ["500", "503", "reset", "reset_after"] * 2
    render(run, ledger, range(17), make, random_pixels)
    assert not s3.faults
    assert ledger.find(make.request(3).request_id).size_bytes > 100
    run.close()
    num_parts = sum("/metadata/part-" in path for method, path in s3.requests if method == "PUT")
    parts = [file.name for file in run.storage.list_files("metadata")]
    assert len(parts) < 17 <= num_parts

    run = begin()
    assert run.is_resumed
    assert [session.epoch for session in read_run(run.out).sessions] == [1, 2]
    ledger = open_ledger(run)
    assert ledger.warnings == []
    assert [seed for seed in range(20) if not ledger.is_done(seed, 0)] == [17, 18, 19]
    render(run, ledger, range(17, 19), make, random_pixels)
    table = read_results(run.out)
    assert table["seed"].to_pylist() == list(range(19))
    assert table.schema == read_results_schema(run.out)
    assert count_statuses(run.out) == {"completed": 19}
    verification = Verification(run.out)
    assert list(verification) == []
    assert verification.num_files == 19


def test_a_damaged_part_is_set_aside(
    begin: Callable[..., Run], make: Any, random_pixels: Any
) -> None:
    run = begin()
    ledger = open_ledger(run)
    render(run, ledger, range(3), make, random_pixels)
    run.close()
    name = "metadata/part-000001-000002.parquet"
    run.storage.put(name, run.storage.read(name)[:-100])
    ledger = open_ledger(begin())
    assert not ledger.is_done(1, 0)
    assert ledger.is_done(2, 0)
    assert "set aside as .part-000001-000002.parquet.damaged" in ledger.warnings[0]


def test_a_driver_that_lost_the_run_commits_nothing(
    begin: Callable[..., Run], make: Any, random_pixels: Any
) -> None:
    first = begin()
    ledger = open_ledger(first)
    render(first, ledger, range(2), make, random_pixels)
    # Another driver has found the first one silent, and claims the next epoch.
    first.storage.put(".lock/epoch-000002.json", first.storage.read(".lock/epoch-000001.json"))
    before = [file.name for file in first.storage.list_files("metadata")]
    with pytest.raises(EngineError, match="no longer holds the folder"):
        render(first, ledger, range(2, 3), make, random_pixels)
    assert [file.name for file in first.storage.list_files("metadata")] == before


def test_another_run_and_other_objects_are_refused(begin: Callable[..., Run], s3: FaultyS3) -> None:
    run = begin()
    run.close()
    with pytest.raises(OutputError, match="it holds another run: manifest was"):
        begin(manifest_fingerprint="cd" * 16)
    parent = run.out.rpartition("/")[0]
    with pytest.raises(OutputError, match=r"and is not a run\. Choose a new or empty folder"):
        start_run(
            parent,
            config=RunConfig(),
            manifest_uri="x",
            manifest_fingerprint="y",
            num_rows=1,
            models={},
        )
    with pytest.raises(OutputError, match=r"not a run: it has no run\.json"):
        read_results(s3.new_uri())


def test_status_is_told_of_a_live_and_of_a_dead_run(
    begin: Callable[..., Run], s3: FaultyS3, make: Any, random_pixels: Any
) -> None:
    run = begin()
    ledger = open_ledger(run)
    render(run, ledger, range(2), make, random_pixels)
    progress_file = ProgressFile(run.out, epoch=run.lock.epoch, started_at=time.time())

    def update(state: str, now: float) -> None:
        progress_file.update(
            state=state,  # type: ignore[arg-type]
            total=9,
            done=2,
            failed=0,
            quarantined=0,
            duplicates=0,
            workers=[{"worker_id": "w0"}],
            now=now,
        )

    update("running", 0.0)
    s3.outage_until = time.monotonic() + 1.0
    started = time.monotonic()
    for now in range(100):
        update("running", 10.0 + 6 * now)
    assert time.monotonic() - started < 0.9, "the run waited for a status that could not be written"
    s3.outage_until = 0.0
    update("interrupted", 1000.0)
    assert read_progress(run.out).state == "interrupted"
    update("running", 2000.0)
    time.sleep(0.5)
    run.close()
    assert read_progress(run.out).state == "stopped"
    assert read_progress(run.out).done == 2


def test_scores_and_queries_work_on_it(
    begin: Callable[..., Run], make: Any, random_pixels: Any
) -> None:
    run = begin()
    render(run, open_ledger(run), range(4), make, random_pixels)
    with ScoreTable(run.out, "mean", hook="x:y", arguments={}) as scores:
        for seed in range(3):
            values = {"mean": seed / 2}
            scores.add(FileScore(request_id=make.request(seed).request_id, values=values))
            scores.commit()
    assert read_scores(run.out, "mean")["mean"].to_pylist() == [0.0, 0.5, 1.0]
    with query_results(run.out, "SELECT seed, mean FROM results ORDER BY seed") as reader:
        assert reader.read_all().to_pydict() == {
            "seed": [0, 1, 2, 3],
            "mean": [0.0, 0.5, 1.0, None],
        }
