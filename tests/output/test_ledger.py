"""The metadata table: what was committed stays, once, through crashes, merges and resumes."""

import multiprocessing
import os
import random
import signal
import time
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from raydiff.config import OutputConfig
from raydiff.errors import DiskError, EngineError, OutputError
from raydiff.output.ledger import Ledger, count_statuses, read_results, read_results_schema
from raydiff.output.lock import RunLock
from raydiff.output.media import read_image_metadata
from raydiff.output.metadata_schema import COLUMNS
from raydiff.request import ManifestRow, RenderRequest, RenderResult
from raydiff.video_settings import VideoSettings

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

EXTRA = pa.schema([("note", pa.string()), ("tags", pa.list_(pa.int64())), ("category", pa.int8())])
CONTRACT_TEXT = (
    "request_id row_index image_index status error file_name sha256 size_bytes member offset "
    "duration_s audio_sample_rate wav_sha256 model "
    "task prompt negative_prompt seed height width num_inference_steps guidance_scale "
    "guidance_rescale sampler strength init_image init_image_sha256 model_revision "
    "num_frames frame_rate video_mode text_encoder stg_scale stg_blocks modality_scale "
    "audio_guidance_scale audio_stg_scale audio_modality_scale audio_guidance_rescale "
    "nfe profile dtype batch_size worker_id node "
    "device num_threads encode_s denoise_s decode_s write_s peak_vram_bytes raydiff_version "
    "finished_at warning"
)
CONTRACT = CONTRACT_TEXT.split()


@pytest.fixture
def open_ledger(begin, make):
    def open_(extra_schema=make.no_columns, **settings):
        run, config = begin(), OutputConfig(**settings)
        return run, Ledger(run.out_dir, extra_schema=extra_schema, config=config, lock=run.lock)

    return open_


def add_rows(ledger, make, rows, *, commit_every=None):
    for row in rows:
        request = make.request(row)
        assert ledger.add(make.row(request, row), make.result(request))
        if commit_every and row % commit_every == commit_every - 1:
            ledger.commit()
    ledger.commit()


def part_paths(out_dir: Path) -> list[Path]:
    return sorted((out_dir / "metadata").glob("part-*.parquet"))


def test_columns_are_the_contracts_in_its_order():
    assert list(COLUMNS) == CONTRACT
    nouns = (RenderRequest, VideoSettings, RenderResult)
    known = {field.name for noun in nouns for field in fields(noun)}
    assert known - {"video"} <= set(COLUMNS)


def test_some_columns_are_those_of_the_whole(open_ledger, make):
    run, ledger = open_ledger()
    assert read_results_schema(run.out_dir) == read_results(run.out_dir).schema
    add_rows(ledger, make, random.Random(3).sample(range(50), 50), commit_every=7)
    whole = read_results(run.out_dir)
    some = read_results(run.out_dir, ["seed", "gone", "image_index", "prompt"])
    assert some == whole.select(["row_index", "image_index", "seed", "prompt"])
    assert read_results_schema(run.out_dir) == whole.schema


def test_every_value_comes_back(open_ledger, make):
    run, ledger = open_ledger(EXTRA)
    request = make.request(
        3,
        negative_prompt=None,
        task="img2img",
        strength=0.625,
        init_image="/x/é.png",
        init_image_sha256="cd" * 32,
    )
    result = make.result(
        request,
        warning="cut",
        node="n1",
        device="cuda:0",
        denoise_s=1.5,
        decode_s=0.25,
        write_s=0.5,
        peak_vram_bytes=2**40,
    )
    extra = pa.RecordBatch.from_pylist([{"note": "山", "tags": [1, 2], "category": -5}], EXTRA)
    row = replace(make.row(request, 2**40, 4095), extra=extra)
    ledger.add(row, result)
    ledger.commit()
    (values,) = read_results(run.out_dir).to_pylist()
    assert list(values) == [*CONTRACT, "note", "tags", "category"]
    for noun in (request, result):
        for field in fields(noun):
            if field.name not in ("finished_at", "video"):
                assert values[field.name] == getattr(noun, field.name), field.name
    assert (values["row_index"], values["image_index"]) == (2**40, 4095)
    assert values["finished_at"] == datetime.fromtimestamp(result.finished_at, UTC)
    assert (values["note"], values["tags"], values["category"]) == ("山", [1, 2], -5)
    assert ledger.find(request.request_id) == result


def test_clips_and_images_share_a_table(open_ledger, make):
    """A clip's settings stand beside the request's; an image's are null."""
    run, ledger = open_ledger()
    settings = {
        "video_mode": "two_stage",
        "text_encoder": "precomputed",
        "num_frames": 121,
        "frame_rate": 24000 / 1001,
        "stg_scale": 1.0,
        "stg_blocks": (28, 29),
        "modality_scale": 3.0,
        "audio_guidance_scale": 7.0,
        "audio_stg_scale": 0.5,
        "audio_modality_scale": 2.5,
        "audio_guidance_rescale": 0.7,
    }
    assert list(settings) == [field.name for field in fields(VideoSettings)]
    made = {
        "duration_s": 121 * 1001 / 24000,
        "audio_sample_rate": 24_000,
        "wav_sha256": "ab" * 32,
        "nfe": 163,
    }
    for row in range(300):
        is_clip = row % 3 == 0
        video = VideoSettings(**settings) if is_clip else None
        request = make.request(row, task="txt2vid" if is_clip else "txt2img", video=video)
        result = make.result(request, **(made if is_clip else {}))
        ledger.add(make.row(request, row), result)
        if is_clip:
            clip = result
    ledger.add(
        ManifestRow(row_index=300, image_index=0, request=None, error="row 300: bad", extra=None),
        RenderResult(request_id="", status="failed"),
    )
    ledger.commit()
    image, clip_row, bad = (
        read_results(run.out_dir).slice(row, 1).to_pylist()[0] for row in (298, 297, 300)
    )
    expected = {**settings, **made, "stg_blocks": [28, 29]}
    assert {name: clip_row[name] for name in expected} == expected
    assert all(image[name] is None and bad[name] is None for name in expected)
    assert ledger.find(clip.request_id) == clip
    # What repeats is stored once: the list's numbers too.
    (part,) = part_paths(run.out_dir)
    group = pq.read_metadata(part).row_group(0)
    columns = [group.column(index) for index in range(group.num_columns)]
    plain = {one.path_in_schema for one in columns if "RLE_DICTIONARY" not in one.encodings}
    assert plain == {
        *("request_id", "row_index", "image_index", "file_name", "sha256", "size_bytes", "seed"),
        *("member", "offset", "wav_sha256", "write_s", "finished_at"),
    }


def test_a_row_that_failed_validation_keeps_its_own_columns(open_ledger, make):
    run, ledger = open_ledger(EXTRA)
    extra = pa.RecordBatch.from_pylist([{"note": "kept", "tags": None, "category": 1}], EXTRA)
    row = ManifestRow(
        row_index=5, image_index=0, request=None, error="row 5: height is 3", extra=extra
    )
    ledger.add(row, RenderResult(request_id="", status="failed"))
    ledger.commit()
    (values,) = read_results(run.out_dir).to_pylist()
    assert values["status"] == "failed"
    assert values["error"] == "row 5: height is 3"
    assert values["note"] == "kept"
    for name in ("request_id", "prompt", "seed", "model", "file_name"):
        assert values[name] is None
    assert ledger.counts == {"completed": 0, "failed": 1, "quarantined": 0}
    assert ledger.find("00" * 16) is None


def test_hard_texts_come_back(open_ledger, make):
    run, ledger = open_ledger()
    prompts = ["", "\x00", "a\nb", "../../x", "🏔️é山", "x" * 100_000, "not \udc80 utf-8"]
    for row, prompt in enumerate(prompts):
        request = make.request(row, prompt=prompt)
        ledger.add(make.row(request, row), make.result(request))
    ledger.commit()
    stored = read_results(run.out_dir)["prompt"].to_pylist()
    assert stored == [*prompts[:-1], "not \\udc80 utf-8"]


def test_an_empty_run_is_an_empty_table(open_ledger):
    run, ledger = open_ledger()
    assert ledger.commit() == 0
    table = read_results(str(run.out_dir))
    assert table.num_rows == 0
    assert table.schema.names == CONTRACT


def test_results_are_sorted_and_readable_as_a_plain_dataset(open_ledger, make):
    run, ledger = open_ledger()
    keys = [(row, image) for row in range(40) for image in range(3)]
    random.Random(3).shuffle(keys)
    for count, (row, image) in enumerate(keys):
        request = make.request(row * 10 + image)
        ledger.add(make.row(request, row, image), make.result(request))
        if count % 25 == 0:
            ledger.commit()
    ledger.commit()
    table = read_results(run.out_dir)
    rows, images = table["row_index"].to_pylist(), table["image_index"].to_pylist()
    assert list(zip(rows, images, strict=True)) == sorted(keys)
    plain = pyarrow.dataset.dataset(run.out_dir / "metadata", format="parquet").to_table()
    assert plain.schema.names == CONTRACT
    assert plain.num_rows == 120


def test_a_table_beyond_32_bit_offsets_is_read_by_blocks(open_ledger, make, monkeypatch):
    run, ledger = open_ledger(EXTRA)
    rows = list(range(50))
    random.Random(5).shuffle(rows)
    for row in rows:
        request = make.request(row)
        ledger.add(make.row(request, row), make.result(request))
        ledger.commit()
    whole = read_results(run.out_dir)
    monkeypatch.setattr("raydiff.output.ledger.LARGE_TABLE_BYTES", 0)
    monkeypatch.setattr("raydiff.output.ledger.TAKE_ROWS", 7)
    in_blocks = read_results(run.out_dir)
    assert in_blocks.equals(whole)
    assert in_blocks["row_index"].num_chunks == 8


@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_reading_a_folder_that_is_not_a_run_says_so(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / folder, tmp_path / "file"):
        with pytest.raises(OutputError, match=f"{path.name}: (not a run|no such folder)"):
            read_results(path)


def test_resume_knows_what_was_done(open_ledger, make):
    run, ledger = open_ledger()
    add_rows(ledger, make, range(50), commit_every=7)
    add_rows(ledger, make, range(60, 70))
    request = make.request(99)
    ledger.add(make.row(request, 80), make.result(request))  # Never committed.
    assert ledger.is_done(80, 0)
    run.close()
    run, resumed = open_ledger()
    assert resumed.warnings == []
    assert len(resumed) == 60
    assert [row for row in range(100) if resumed.is_done(row, 0)] == [*range(50), *range(60, 70)]
    assert not resumed.is_done(3, 1)
    assert resumed.num_leading_rows() == 50
    assert resumed.counts["completed"] == 60
    for row in (0, 6, 49, 65):
        request = make.request(row)
        assert resumed.find(request.request_id) == make.result(request)
    assert resumed.find(make.request(99).request_id) is None


def test_a_row_is_taken_once(open_ledger, make):
    run, ledger = open_ledger()
    request = make.request(1)
    row, result = make.row(request, 1), make.result(request)
    assert ledger.add(row, result)
    assert not ledger.add(row, result)
    assert ledger.commit() == 1
    assert not ledger.add(row, make.result(request, status="failed"))
    assert ledger.commit() == 0
    assert ledger.counts == {"completed": 1, "failed": 0, "quarantined": 0}
    assert read_results(run.out_dir)["status"].to_pylist() == ["completed"]


@pytest.mark.parametrize("status", ["completed", "failed", "quarantined"])
def test_equal_requests_find_the_first_ones_result(status, open_ledger, make):
    run, ledger = open_ledger()
    request = make.request(1)
    result = make.result(request, status=status, error="why" if status != "completed" else None)
    assert ledger.find(request.request_id) is None
    ledger.add(make.row(request, 1), result)
    assert ledger.find(request.request_id) == result
    ledger.commit()
    assert ledger.find(request.request_id) == result
    ledger.add(make.row(request, 2), result)
    run.close()
    assert open_ledger()[1].find(request.request_id) == result


def test_a_request_of_the_same_first_64_bits_is_told_apart(open_ledger, make):
    _, ledger = open_ledger()
    twins = [replace(make.request(n), request_id="ab" * 8 + f"{n:016x}") for n in range(3)]
    for n, request in enumerate(twins[:2]):
        ledger.add(make.row(request, n), make.result(request))
        ledger.commit()
    assert [ledger.find(one.request_id) for one in twins] == [
        make.result(twins[0]),
        make.result(twins[1]),
        None,
    ]


def test_commits_are_due_by_rows_and_by_time(open_ledger, make):
    _, ledger = open_ledger(commit_rows=3, commit_s=5.0)
    now = time.monotonic()
    assert not ledger.should_commit(now + 100)
    add = [make.request(n) for n in range(3)]
    for n, request in enumerate(add):
        assert not ledger.should_commit(time.monotonic())
        ledger.add(make.row(request, n), make.result(request))
        if n == 0:
            assert ledger.should_commit(time.monotonic() + 5.1)
    assert ledger.should_commit(time.monotonic())
    ledger.commit()
    assert not ledger.should_commit(now + 100)


def test_small_parts_are_merged_and_everything_is_still_found(open_ledger, make):
    run, ledger = open_ledger()
    add_rows(ledger, make, range(300), commit_every=2)
    assert len(part_paths(run.out_dir)) <= 32
    requests = [make.request(row) for row in range(300)]
    for session in range(2):
        found = [ledger.find(request.request_id) for request in requests]
        assert found == [make.result(request) for request in requests], session
        run.close()
        run, ledger = open_ledger()
        assert ledger.warnings == []
    table = read_results(run.out_dir)
    assert table["row_index"].to_pylist() == list(range(300))
    assert ledger.counts["completed"] == 300


def test_each_row_is_rewritten_a_few_times_only(open_ledger, make, monkeypatch):
    """Count the rows of every part that ever appears: merges must not start from all each time."""
    _, ledger = open_ledger()
    written = []
    original = Ledger._new_part_id
    monkeypatch.setattr(
        Ledger, "_new_part_id", lambda self, part: written.append(part) or original(self, part)
    )
    add_rows(ledger, make, range(300), commit_every=1)
    assert sum(part.num_rows for part in written) <= 300 * 3


def test_merged_row_groups_stay_small_enough_to_look_up(open_ledger, make, monkeypatch):
    monkeypatch.setattr("raydiff.output.part_files.ROW_GROUP_ROWS", 10)
    run, ledger = open_ledger()
    add_rows(ledger, make, range(256), commit_every=4)
    sizes = []
    for path in part_paths(run.out_dir):
        footer = pq.read_metadata(path)
        sizes += [footer.row_group(n).num_rows for n in range(footer.num_row_groups)]
    assert max(sizes) <= 20
    for row in random.Random(1).sample(range(256), 60):
        assert ledger.find(make.request(row).request_id) == make.result(make.request(row))


def test_a_crash_between_merging_and_removing_leaves_nothing_wrong(open_ledger, make):
    """Put the replaced parts back, as a crash would leave them."""
    run, ledger = open_ledger()
    add_rows(ledger, make, range(15), commit_every=1)
    saved = {path: path.read_bytes() for path in part_paths(run.out_dir)}
    add_rows(ledger, make, range(15, 16))
    (merged,) = part_paths(run.out_dir)
    for path, data in list(saved.items())[4:]:
        path.write_bytes(data)
    assert read_results(run.out_dir)["row_index"].to_pylist() == list(range(16))
    assert count_statuses(run.out_dir) == {"completed": 16}
    run.close()
    run, resumed = open_ledger()
    assert part_paths(run.out_dir) == [merged]
    assert (len(resumed), resumed.counts["completed"], resumed.warnings) == (16, 16, [])


@pytest.mark.parametrize("keep", [0, 1, 100, -9, -1])
def test_a_torn_part_is_set_aside_and_its_rows_are_not_done(keep, open_ledger, make):
    run, ledger = open_ledger()
    add_rows(ledger, make, range(20), commit_every=10)
    run.close()
    last = part_paths(run.out_dir)[-1]
    last.write_bytes(last.read_bytes()[:keep])
    with pytest.warns(UserWarning, match=f"{last.name}: damaged"):
        assert read_results(run.out_dir).num_rows == 10
    run, resumed = open_ledger()
    (warning,) = resumed.warnings
    assert last.name in warning
    assert [row for row in range(20) if resumed.is_done(row, 0)] == list(range(10))
    add_rows(resumed, make, range(10, 20))
    assert read_results(run.out_dir)["row_index"].to_pylist() == list(range(20))
    assert pyarrow.dataset.dataset(run.out_dir / "metadata").count_rows() == 20


def test_a_part_with_a_good_footer_and_bad_pages_is_set_aside(open_ledger, make):
    run, ledger = open_ledger()
    add_rows(ledger, make, range(20), commit_every=10)
    run.close()
    path = part_paths(run.out_dir)[0]
    data = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = os.urandom(column.total_compressed_size)
    path.write_bytes(data)
    _, resumed = open_ledger()
    assert path.name in resumed.warnings[0]
    assert [row for row in range(20) if resumed.is_done(row, 0)] == list(range(10, 20))


def test_a_part_that_was_never_committed_is_removed(open_ledger, make):
    run, ledger = open_ledger()
    add_rows(ledger, make, range(3))
    left = run.out_dir / "metadata" / ".part-000001-000002.parquet.tmp"
    left.write_bytes(b"half a part")
    run.close()
    assert open_ledger()[1].warnings == []
    assert not left.exists()


def test_a_ledger_opened_again_under_the_same_lock_overwrites_nothing(open_ledger, make):
    run, ledger = open_ledger()
    add_rows(ledger, make, range(5), commit_every=2)
    again = Ledger(run.out_dir, extra_schema=make.no_columns, config=OutputConfig(), lock=run.lock)
    add_rows(again, make, range(5, 9), commit_every=2)
    assert read_results(run.out_dir)["row_index"].to_pylist() == list(range(9))


def test_rows_that_stand_twice_are_dropped_once(open_ledger, make):
    """As two drivers without a working lock would leave them: the first commit stays."""
    run, ledger = open_ledger()
    add_rows(ledger, make, range(10))
    (first,) = part_paths(run.out_dir)
    add_rows(ledger, make, range(10, 15))
    second = part_paths(run.out_dir)[1]
    both = pa.concat_tables([pq.read_table(first).slice(4), pq.read_table(second)])
    pq.write_table(both.slice(0, 9), second)
    assert read_results(run.out_dir)["row_index"].to_pylist() == list(range(13))
    run.close()
    run, resumed = open_ledger()
    assert resumed.warnings == ["6 rows stood twice in the metadata; one was kept."]
    assert (len(resumed), resumed.counts["completed"]) == (13, 13)
    assert pyarrow.dataset.dataset(run.out_dir / "metadata").count_rows() == 13


def test_after_a_restart_of_the_machine_lost_files_are_rendered_again(
    open_ledger, make, render_rows
):
    run, ledger = open_ledger()
    render_rows(run, ledger, range(12))
    ledger.commit()
    names = read_results(run.out_dir)["file_name"].to_pylist()
    (run.out_dir / names[3]).write_bytes(b"")
    (run.out_dir / names[7]).unlink()
    run.close()
    run, same_boot = open_ledger()
    assert (len(same_boot), same_boot.warnings) == (12, [])
    run.close()
    (run.out_dir / "metadata" / ".boot_id").write_text("another boot")
    run, resumed = open_ledger()
    assert [row for row in range(12) if not resumed.is_done(row, 0)] == [3, 7]
    assert resumed.warnings[0].startswith("2 rows lost their files")
    render_rows(run, resumed, range(3, 8, 4))
    resumed.commit()
    table = read_results(run.out_dir)
    assert table["row_index"].to_pylist() == list(range(12))
    for name in table["file_name"].to_pylist():
        assert read_image_metadata(run.out_dir / name) is not None
    run.close()
    assert open_ledger()[1].warnings == []


def test_a_restart_costs_nothing_when_old_files_were_moved_away(open_ledger, make):
    """Only the last two minutes are in doubt: make.result gives rows of one second each."""
    run, ledger = open_ledger()
    add_rows(ledger, make, range(300), commit_every=50)
    run.close()
    (run.out_dir / "metadata" / ".boot_id").write_text("another boot")
    _, resumed = open_ledger()
    done = [row for row in range(300) if resumed.is_done(row, 0)]
    assert done == list(range(179))


def test_a_driver_that_lost_the_folder_commits_nothing(open_ledger, make):
    run, ledger = open_ledger()
    add_rows(ledger, make, range(3))
    (run.out_dir / ".lock").unlink()
    with RunLock(run.out_dir) as lock:
        assert lock.epoch == 2
        request = make.request(3)
        ledger.add(make.row(request, 3), make.result(request))
        with pytest.raises(EngineError, match="no longer holds"):
            ledger.commit()
        with pytest.raises(EngineError):
            Ledger(run.out_dir, extra_schema=make.no_columns, config=OutputConfig(), lock=run.lock)
    assert read_results(run.out_dir).num_rows == 3


def test_a_commit_that_fails_keeps_its_rows_for_the_next(full_disk, make):
    with RunLock(full_disk) as lock:
        ledger = Ledger(full_disk, extra_schema=make.no_columns, config=OutputConfig(), lock=lock)
        add_rows(ledger, make, range(2))
        free = os.statvfs(full_disk)
        (full_disk / "filler").write_bytes(b"x" * (free.f_bavail * free.f_frsize))
        request = make.request(2)
        ledger.add(make.row(request, 2), make.result(request))
        with pytest.raises(DiskError, match=r"part-000001-00000.\.parquet.*No space left"):
            ledger.commit()
        assert len(list((full_disk / "metadata").iterdir())) == 2  # One part and the boot id.
        (full_disk / "filler").unlink()
        assert ledger.commit() == 1
        assert ledger.find(request.request_id) == make.result(request)


def commit_one_by_one(out_dir, builders, counter):
    with RunLock(out_dir) as lock:
        ledger = Ledger(out_dir, extra_schema=builders.no_columns, config=OutputConfig(), lock=lock)
        counter.value = len(ledger)
        for row in range(10_000):
            if not ledger.is_done(row, 0):
                request = builders.request(row)
                ledger.add(builders.row(request, row), builders.result(request))
                ledger.commit()
                counter.value = row + 1


@contextmanager
def driver_in_another_process(out_dir, builders, *, num_rows):
    """Enter when it has committed `num_rows`, SIGKILL it on leaving; then nothing may be lost."""
    context = multiprocessing.get_context("fork")
    counter = context.RawValue("q", 0)
    process = context.Process(target=commit_one_by_one, args=(out_dir, builders, counter))
    process.start()
    try:
        deadline = time.monotonic() + 60
        while counter.value < num_rows:
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        yield counter
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert read_results(out_dir).num_rows in (counter.value, counter.value + 1)


def test_kill_at_any_moment_loses_nothing_that_was_committed(begin, make):
    """SIGKILL a driver again and again while it commits and merges; each goes on from the last."""
    run = begin()
    run.close()
    rng = random.Random(4)
    rows: list[int] = []
    for _ in range(5):
        with driver_in_another_process(run.out_dir, make, num_rows=len(rows) + 9):
            time.sleep(rng.uniform(0, 0.03))
        rows = read_results(run.out_dir)["row_index"].to_pylist()
        assert rows == list(range(len(rows)))
    run = begin()
    ledger = Ledger(run.out_dir, extra_schema=make.no_columns, config=OutputConfig(), lock=run.lock)
    assert ledger.warnings == []
    assert len(ledger) == len(rows) == ledger.num_leading_rows()
    assert pyarrow.dataset.dataset(run.out_dir / "metadata").count_rows() == len(rows)


def test_results_can_be_read_while_a_driver_merges(begin, make):
    run = begin()
    run.close()
    with driver_in_another_process(run.out_dir, make, num_rows=1) as counter:
        while counter.value < 40:
            before = counter.value
            rows = read_results(run.out_dir)["row_index"].to_pylist()
            assert rows == list(range(len(rows)))
            assert len(rows) >= before
