"""Verification finds every file and row that is not what the metadata says, and only those."""

import os

import pyarrow.parquet as pq
import pytest

from raydiff.config import OutputConfig
from raydiff.errors import OutputError
from raydiff.output.ledger import Ledger, read_results
from raydiff.output.verify import Verification
from raydiff.request import ManifestRow, RenderResult


@pytest.fixture
def finished(begin, make, render_rows):
    """A run of 30 rows: 28 with files, 1 that took an equal one's file, 1 failed."""
    run = begin(num_rows=30)
    ledger = Ledger(run.out_dir, extra_schema=make.no_columns, config=OutputConfig(), lock=run.lock)
    render_rows(run, ledger, range(15))
    ledger.commit()
    render_rows(run, ledger, range(15, 28))
    request = make.request(4)
    ledger.add(make.row(request, 28), ledger.find(request.request_id))
    failed = ManifestRow(row_index=29, image_index=0, request=None, error="bad", extra=None)
    ledger.add(failed, RenderResult(request_id="", status="failed"))
    ledger.commit()
    return run


def problems(run):
    return [(one.kind, one.row_index) for one in Verification(run.out_dir)]


def file_of(run, row):
    return run.out_dir / read_results(run.out_dir)["file_name"][row].as_py()


def test_a_sound_run_has_no_problems_and_each_file_is_read_once(finished):
    verification = Verification(finished.out_dir, num_threads=2)
    assert list(verification) == []
    files = list((finished.out_dir / "images").rglob("*.png"))
    assert verification.num_rows == 30
    assert verification.num_missing_rows == 0
    assert verification.num_files == len(files) == 28
    assert verification.num_bytes == sum(path.stat().st_size for path in files)


def test_a_missing_file_is_named_with_its_row(finished):
    file_of(finished, 9).unlink()
    (problem,) = Verification(finished.out_dir)
    assert (problem.kind, problem.row_index, problem.is_error) == ("missing_file", 9, True)
    assert problem.file_name in problem.message


def test_a_cut_file_and_a_changed_byte_are_found(finished):
    cut, changed = file_of(finished, 2), file_of(finished, 20)
    cut.write_bytes(cut.read_bytes()[:-1])
    data = bytearray(changed.read_bytes())
    data[len(data) // 2] ^= 1
    changed.write_bytes(data)
    assert sorted(problems(finished)) == [("wrong_sha256", 20), ("wrong_size", 2)]


def test_a_folder_in_the_place_of_a_file_is_found(finished):
    path = file_of(finished, 2)
    path.unlink()
    path.mkdir()
    assert problems(finished) == [("unreadable_file", 2)]


def test_files_without_a_row_are_orphans_and_no_error(finished):
    images = finished.out_dir / "images"
    (images / "ab").mkdir(exist_ok=True)
    names = [f"images/ab/{os.urandom(16).hex()}.png", "images/ab/notes.txt", "images/stray.png"]
    for name in names:
        (finished.out_dir / name).write_bytes(b"x")
    (images / ".tmp" / "half.tmp").write_bytes(b"x")
    found = list(Verification(finished.out_dir))
    assert sorted(one.file_name for one in found) == sorted(names)
    assert {(one.kind, one.is_error) for one in found} == {("orphan", False)}


def test_rows_that_stand_twice_are_found(finished):
    folder = finished.out_dir / "metadata"
    first = sorted(folder.glob("part-*"))[0]
    pq.write_table(pq.read_table(first).slice(3, 2), folder / "part-000009-000001.parquet")
    assert problems(finished) == [("duplicate_row", 3), ("duplicate_row", 4)]


def test_rows_that_the_manifest_does_not_have_are_found(finished, make):
    ledger = Ledger(
        finished.out_dir, extra_schema=make.no_columns, config=OutputConfig(), lock=finished.lock
    )
    row = ManifestRow(row_index=30, image_index=0, request=None, error="x", extra=None)
    ledger.add(row, RenderResult(request_id="", status="failed"))
    ledger.commit()
    assert problems(finished) == [("unknown_row", 30)]


def test_rows_still_to_be_rendered_are_counted(begin, make, render_rows):
    run = begin(num_rows=1000)
    ledger = Ledger(run.out_dir, extra_schema=make.no_columns, config=OutputConfig(), lock=run.lock)
    verification = Verification(run.out_dir)
    assert list(verification) == []
    assert (verification.num_rows, verification.num_missing_rows) == (0, 1000)
    render_rows(run, ledger, range(5))
    assert {one.kind for one in Verification(run.out_dir)} == {"orphan"}  # Not yet committed.
    ledger.commit()
    assert list(verification) == []
    assert (verification.num_rows, verification.num_missing_rows) == (5, 995)


def test_a_damaged_part_is_found_and_the_rest_is_checked(finished):
    _, second = sorted((finished.out_dir / "metadata").glob("part-*"))
    file_of(finished, 2).unlink()
    second.write_bytes(second.read_bytes()[:-20])
    found = list(Verification(finished.out_dir))
    kinds = [one.kind for one in found if one.is_error]
    assert sorted(kinds) == ["damaged_part", "missing_file"]
    assert second.name in next(one.message for one in found if one.kind == "damaged_part")


def test_damage_in_a_column_of_file_names_only_is_found(finished):
    first, _ = sorted((finished.out_dir / "metadata").glob("part-*"))
    group = pq.read_metadata(first).row_group(0)
    (column,) = (
        group.column(n)
        for n in range(group.num_columns)
        if group.column(n).path_in_schema == "sha256"
    )
    data = bytearray(first.read_bytes())
    start = column.data_page_offset
    data[start : start + column.total_compressed_size] = os.urandom(column.total_compressed_size)
    first.write_bytes(data)
    assert [kind for kind, _ in problems(finished)] == ["damaged_part"]


def test_a_folder_that_is_not_a_run_is_named(tmp_path):
    with pytest.raises(OutputError, match="not a run"):
        Verification(tmp_path)
