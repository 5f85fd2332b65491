"""Whatever reads a run's images reads them from shards too, and says what is wrong with one."""

import asyncio
import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raydiff.engine.score_worker import ScoreBatch, ScoreSpec, ScoreWorker
from raydiff.output.diff import RunDiff
from raydiff.output.gallery.build import Gallery
from raydiff.output.ledger import read_results
from raydiff.output.media_files import MediaError, check_media, open_media, read_media
from raydiff.output.sheet.grid import read_grid
from raydiff.output.sheet.pictures import make_picture
from raydiff.output.sheet.sheet import Sheet
from raydiff.output.verify import Verification
from tests.output.generated_runs import random_pixels, write_run

ROWS = [{"seed": seed, "guidance_scale": 1.0 + seed % 3} for seed in range(12)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """The same run in files and in shards of 8."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        format_: write_run(folder / format_, ROWS, format_=format_)
        for format_ in ("files", "webdataset")
    }


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A run in shards of 8, to be damaged."""
    return write_run(tmp_path / "run", ROWS, format_="webdataset")


def rows_of(out: Path) -> list[dict]:
    return read_results(out).to_pylist()


@pytest.mark.parametrize("format_", ["files", "webdataset"])
def test_an_image_is_read_as_it_was_written(format_, runs):
    for row in rows_of(runs[format_]):
        check_media(runs[format_], row)
        data = read_media(runs[format_], row)
        assert hashlib.sha256(data).hexdigest() == row["sha256"]
        with open_media(runs[format_], row) as file, Image.open(file) as image:
            assert np.array_equal(np.asarray(image), random_pixels(row["seed"]))


def test_both_formats_hold_the_same_bytes(runs):
    files, shards = (read_results(runs[one]) for one in ("files", "webdataset"))
    for name in ("request_id", "sha256", "size_bytes"):
        assert files[name].equals(shards[name])
    found = RunDiff(runs["files"], runs["webdataset"])
    assert list(found) == []
    assert found.counts["equal"] == len(ROWS)


def test_images_in_shards_are_compared_by_their_pixels(runs, tmp_path):
    changed = [dict(row) for row in ROWS]
    changed[3]["pixels"] = random_pixels(3) // 2
    other = write_run(tmp_path / "other", changed, format_="webdataset")
    (found,) = RunDiff(runs["webdataset"], other)
    assert (found.outcome, found.left_row) == ("different", 3)
    assert found.similarity.max_abs > 100
    assert found.left_file.startswith("shards/000000.tar:")


def test_shards_verify(runs):
    verification = Verification(runs["webdataset"])
    assert list(verification) == []
    assert verification.num_files == len(ROWS)


def test_what_is_wrong_with_a_shard_is_found(sharded):
    rows = rows_of(sharded)
    tar = sharded / "shards/000000.tar"
    data = bytearray(tar.read_bytes())
    data[rows[2]["offset"] + 50] ^= 1
    data[rows[5]["offset"] - 500] ^= 1  # the name in its header
    tar.write_bytes(data[: rows[7]["offset"] + 10])
    (sharded / "shards/000001.tar").unlink()
    (sharded / "shards/000002.tar").write_bytes(b"not ours")
    found = {(one.kind, one.row_index): one for one in Verification(sharded)}
    assert found.keys() == {
        ("wrong_sha256", 2),
        ("unreadable_file", 5),
        ("unreadable_file", 7),
        *(("missing_file", row) for row in range(8, 12)),
        ("orphan", None),
    }
    assert f"shards/000000.tar:{rows[5]['member']}" in found["unreadable_file", 5].message
    assert found["orphan", None].file_name == "shards/000002.tar"
    for row, message in ((5, "does not have it"), (7, "it has 10 bytes"), (8, "shard is missing")):
        for check in (check_media, read_media):
            with pytest.raises(MediaError, match=message):
                check(sharded, rows[row])


@pytest.mark.parametrize("name", ["../x.png", "/etc/hosts", "images/../../x.png"])
@pytest.mark.parametrize("member", [None, "a.png"])
def test_a_name_that_leads_out_of_the_run_is_not_read(name, member, runs):
    row = {"file_name": name, "member": member, "offset": 512, "size_bytes": 10}
    for check in (check_media, read_media):
        with pytest.raises(MediaError, match="leads out"):
            check(runs["files"], row)


def test_a_sheet_shows_members_of_shards(runs):
    for row in rows_of(runs["webdataset"]):
        picture = make_picture(runs["webdataset"], row, (24, 24), 1)
        assert picture.image is not None
        assert picture.image.width == 24
    grid, _ = read_grid(runs["webdataset"], x="seed")
    sheet = Sheet(runs["webdataset"], grid)
    assert list(sheet)
    assert not sheet.problems


def test_a_gallery_shows_members_of_shards(runs, tmp_path):
    found = Gallery(runs["webdataset"], tmp_path / "gallery").refresh()
    assert (found.num_made, found.problems) == (len(ROWS), ())
    assert len(list((tmp_path / "gallery").rglob("*.jpg"))) == len(ROWS)


def test_a_hook_scores_members_of_shards(runs):
    values = {}
    for format_, out in runs.items():
        hook = "raydiff.score_hooks:brightness"
        spec = ScoreSpec(out=str(out), name="light", hook=hook, arguments={}, import_dir=".")
        worker = ScoreWorker("w0", spec)
        asyncio.run(worker.start())
        reply = asyncio.run(worker.render(ScoreBatch(rows=tuple(rows_of(out)))))
        assert all(one.error is None for one in reply.scores)
        values[format_] = [one.values for one in reply.scores]
    assert values["files"] == values["webdataset"]
