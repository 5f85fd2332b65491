"""Failed rows are found and taken out of the metadata, those that are meant and no others."""

import pytest

from raydiff.config import OutputConfig
from raydiff.errors import EngineError, OutputError
from raydiff.output.failed_rows import FailedRows, drop_failed_rows, find_failed_rows
from raydiff.output.ledger import Ledger, read_results

STATUSES = {3: "failed", 14: "failed", 15: "failed", 22: "quarantined"}
ERRORS = {3: "Out of memory: 3", 14: "height is 63", 15: "out of MEMORY: 15", 22: "workers died"}


@pytest.fixture
def ended_run(begin, make):
    """Thirty rows in three parts, four of them without an image."""
    run = begin()
    config = OutputConfig()
    ledger = Ledger(run.out_dir, extra_schema=make.no_columns, config=config, lock=run.lock)
    for row in range(30):
        request = make.request(row)
        status, error = STATUSES.get(row, "completed"), ERRORS.get(row)
        ledger.add(make.row(request, row), make.result(request, status=status, error=error))
        if row % 10 == 9:
            ledger.commit()
    return run


def rows_of(run) -> list[int]:
    return read_results(run.out_dir, ["row_index"])["row_index"].to_pylist()


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [
        (FailedRows(), [3, 14, 15]),
        (FailedRows(statuses=("failed", "quarantined")), [3, 14, 15, 22]),
        (FailedRows(matching="out of memory"), [3, 15]),
        (FailedRows(matching="a.c"), []),
    ],
)
def test_the_rows_that_are_meant_are_found_and_dropped(ended_run, wanted, rows):
    found = find_failed_rows(str(ended_run.out_dir), wanted)
    assert found["row_index"].to_pylist() == rows
    assert found["error"].to_pylist() == [ERRORS[row] for row in rows]
    before = read_results(ended_run.out_dir)
    assert drop_failed_rows(ended_run, wanted) == len(rows)
    assert rows_of(ended_run) == [row for row in range(30) if row not in rows]
    left = read_results(ended_run.out_dir)
    assert left == before.filter([row not in rows for row in range(30)])
    assert drop_failed_rows(ended_run, wanted) == 0


def test_a_ledger_opened_after_it_takes_the_rows_as_not_done(ended_run, make):
    drop_failed_rows(ended_run, FailedRows())
    ledger = Ledger(
        ended_run.out_dir,
        extra_schema=make.no_columns,
        config=OutputConfig(),
        lock=ended_run.lock,
    )
    assert ledger.warnings == []
    assert not ledger.is_done(3, 0)
    assert ledger.find(make.request(3).request_id) is None
    assert ledger.is_done(22, 0)
    request = make.request(3)
    assert ledger.add(make.row(request, 3), make.result(request))
    ledger.commit()
    assert ledger.counts == {"completed": 27, "failed": 0, "quarantined": 1}


def test_a_driver_that_lost_the_folder_drops_nothing_more(ended_run):
    """The rows of a part are dropped together, and none after the lock is gone."""
    lock = ended_run.out_dir / ".lock"
    content = lock.read_bytes()
    lock.write_bytes(content.replace(b'"epoch": 1', b'"epoch": 2'))
    with pytest.raises(EngineError, match="no longer holds"):
        drop_failed_rows(ended_run, FailedRows())
    assert rows_of(ended_run) == list(range(30))


def test_a_whole_part_may_go(begin, make):
    run = begin()
    config = OutputConfig()
    ledger = Ledger(run.out_dir, extra_schema=make.no_columns, config=config, lock=run.lock)
    request = make.request(0)
    ledger.add(make.row(request, 0), make.result(request, status="failed", error="late"))
    ledger.commit()
    assert drop_failed_rows(run, FailedRows()) == 1
    assert rows_of(run) == []
    assert find_failed_rows(str(run.out_dir), FailedRows()).num_rows == 0


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(OutputError, match="not a run"):
        find_failed_rows(str(tmp_path), FailedRows())
