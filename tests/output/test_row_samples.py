"""Rows by the beginning of their request_id, and samples that are the same for the same seed."""

import pytest

from raydiff.config import OutputConfig
from raydiff.errors import OutputError
from raydiff.output.ledger import Ledger
from raydiff.output.row_samples import find_request, sample_requests


@pytest.fixture
def out(begin, make):
    """Forty rows: 0 and 1 are of one request, every tenth has failed."""
    run = begin()
    ledger = Ledger(run.out_dir, extra_schema=make.no_columns, config=OutputConfig(), lock=run.lock)
    for row in range(40):
        request = make.request(max(row, 1))
        status = "failed" if row % 10 == 9 else "completed"
        ledger.add(make.row(request, row), make.result(request, status=status))
        if row % 15 == 14:
            ledger.commit()
    ledger.commit()
    return run.out_dir


def test_a_request_is_found_by_its_beginning(out, make):
    request_id = make.request(17).request_id
    for name in (request_id, request_id[:9], request_id[:9].upper()):
        row = find_request(out, name)
        assert (row["row_index"], row["request_id"], row["seed"]) == (17, request_id, 17)
    assert find_request(out, make.request(1).request_id)["row_index"] == 0
    with pytest.raises(OutputError, match="no request begins so"):
        find_request(out, "xyz")
    with pytest.raises(OutputError, match="requests begin so"):
        find_request(out, "")


def test_a_sample_has_each_request_once_and_is_the_same_each_time(out, make):
    sample = sample_requests(out, share=0.25, number=1, seed=0)
    assert sample.num_rows == 9  # of 35 requests with an image
    assert set(sample["status"].to_pylist()) == {"completed"}
    ids = sample["request_id"].to_pylist()
    assert len(set(ids)) == 9
    assert sample_requests(out, share=0.25, number=1, seed=0) == sample
    assert sample_requests(out, share=0.25, number=1, seed=1)["request_id"].to_pylist() != ids


def test_a_sample_is_no_larger_than_what_there_is(out, make):
    assert sample_requests(out, share=0.0, number=500, seed=0).num_rows == 35
    assert sample_requests(out, share=0.001, number=1, seed=0).num_rows == 1
