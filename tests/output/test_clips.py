"""Whatever reads a run reads one of clips: the files of every format, whole or damaged."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raydiff.config import OutputConfig
from raydiff.engine.score_worker import ScoreBatch, ScoreSpec, ScoreWorker
from raydiff.output.diff import RunDiff
from raydiff.output.gallery.build import Gallery
from raydiff.output.ledger import Ledger, read_results
from raydiff.output.lock import RunLock
from raydiff.output.pictures import make_picture
from raydiff.output.recovery import BOOT_ID_FILE
from raydiff.output.sheet import Sheet
from raydiff.output.sheet_grid import read_grid
from raydiff.output.verify import Verification
from tests.clips import FRAME_RATE, NUM_FRAMES, SAMPLE_RATE, clip_pixels
from tests.output.generated_runs import NO_COLUMNS, clip_rows, write_run

SETTINGS: dict[str, dict[str, Any]] = {
    "mp4": {},
    "frames": {"video": "frames", "wav": True},
    "gif": {"video": "gif"},
    "shards": {"format_": "webdataset", "wav": True},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same three clips in every format."""
    folder = tmp_path_factory.mktemp("runs")
    rows = clip_rows(range(3))
    return {name: write_run(folder / name, rows, **given) for name, given in SETTINGS.items()}


def rows_of(out: Path) -> list[dict[str, Any]]:
    return read_results(out).to_pylist()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_row_says_what_a_clip_is(name: str, runs: dict[str, Path]) -> None:
    *_, silent = rows = rows_of(runs[name])
    for row in rows:
        assert (row["num_frames"], row["frame_rate"]) == (NUM_FRAMES, FRAME_RATE)
        assert row["duration_s"] == NUM_FRAMES / FRAME_RATE
        assert row["audio_sample_rate"] == (None if row == silent else SAMPLE_RATE)
        assert (row["stg_blocks"], row["video_mode"]) == ([29], "one_stage")


@pytest.mark.parametrize("name", SETTINGS)
def test_whole_clips_verify(name: str, runs: dict[str, Path]) -> None:
    verification = Verification(runs[name])
    assert list(verification) == []
    assert verification.num_files == (3 + 3 * NUM_FRAMES + 2 if name == "frames" else 3)


def damage_cases() -> list[Any]:
    """Return, by name: the format, what to do to the second clip's files, and what is found."""

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1])

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    def stray(path: Path) -> None:
        path.write_bytes(b"x")

    def removed(path: Path) -> None:
        path.unlink()

    cases = [
        ("mp4", ".mp4", removed, "missing_file"),
        ("mp4", ".mp4", cut, "wrong_size"),
        ("mp4", ".mp4", flip, "wrong_sha256"),
        ("gif", ".gif", flip, "wrong_sha256"),
        ("frames", "/frames.json", removed, "missing_file"),
        ("frames", "/frames.json", flip, "wrong_sha256"),
        ("frames", "/00003.png", removed, "missing_file"),
        ("frames", "/00003.png", cut, "wrong_size"),
        ("frames", "/00003.png", flip, "wrong_sha256"),
        ("frames", "/00009.png", stray, "orphan"),
        ("frames", ".wav", removed, "missing_file"),
        ("frames", ".wav", cut, "unreadable_file"),
    ]
    return [pytest.param(*case, id=f"{case[1]}-{case[2].__name__}") for case in cases]


@pytest.mark.parametrize(("name", "ending", "damage", "kind"), damage_cases())
def test_every_damage_of_a_clip_is_found(
    name: str, ending: str, damage: Callable[[Path], None], kind: str, tmp_path: Path
) -> None:
    out = write_run(tmp_path / "run", clip_rows(range(2)), **SETTINGS[name])
    first = rows_of(out)[0]["request_id"]
    file_name = f"videos/{first[:2]}/{first}{ending}"
    damage(out / file_name)
    (found,) = Verification(out)
    assert (found.kind, found.file_name) == (kind, file_name)
    assert found.row_index == (None if kind == "orphan" else 0)
    assert file_name in found.message
    lost = kind in ("missing_file", "wrong_size", "unreadable_file")
    assert rows_after_a_power_loss(out, SETTINGS[name]) == ([1] if lost else [0, 1])


def rows_after_a_power_loss(out: Path, given: dict[str, Any]) -> list[int]:
    """Return the rows that a driver still counts as done once the machine has restarted."""
    (out / "metadata" / BOOT_ID_FILE).write_text("another boot")
    config = OutputConfig(**{key: value for key, value in given.items() if key != "format_"})
    with RunLock(out).acquire() as lock:
        ledger = Ledger(out, extra_schema=NO_COLUMNS, config=config, lock=lock)
        return [row for row in range(2) if ledger.is_done(row, 0)]


def test_files_that_no_row_names_are_orphans(tmp_path: Path) -> None:
    """A crash leaves a video, a sound, a folder without its index, and half a file."""
    out = write_run(tmp_path / "run", clip_rows(range(1)), wav=True)
    known = rows_of(out)[0]["request_id"]
    stray = "ab" * 16
    names = [f"videos/ab/{stray}.mp4", f"videos/ab/{stray}.wav", "videos/ab/" + "ac" * 16]
    (out / names[2]).mkdir(parents=True)
    (out / names[2] / "00000.png").write_bytes(b"x")
    for name in names[:2]:
        (out / name).write_bytes(b"x")
    (out / "videos" / ".tmp" / "half.tmp").write_bytes(b"x")
    (out / f"videos/{known[:2]}/{known}.wav").write_bytes(b"x")  # A silent clip has none.
    found = list(Verification(out))
    assert sorted(str(one.file_name) for one in found) == sorted(names)
    assert {one.kind for one in found} == {"orphan"}


def test_an_index_that_leads_elsewhere_is_not_followed(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", clip_rows(range(1)), **SETTINGS["frames"])
    (row,) = rows_of(out)
    index = json.loads((out / row["file_name"]).read_bytes())
    index["files"][0]["name"] = "../../../../secret.png"
    data = json.dumps(index).encode()
    (out / row["file_name"]).write_bytes(data)
    picture = make_picture(out, row, (24, 24), 1)
    assert (picture.problem, picture.image) == ("broken", None)
    assert "not an index of frames" in picture.message


@pytest.mark.parametrize("name", SETTINGS)
def test_a_clip_is_shown_scored_and_compared(
    name: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    out = runs[name]
    grid, _ = read_grid(out, x="seed")
    sheet = Sheet(out, grid, cell_size=32, num_frames=3)
    assert list(sheet)
    assert not sheet.problems
    for row in rows_of(out):
        picture = make_picture(out, row, (32, 32), 3)
        assert picture.image is not None
        assert picture.image.size == (3 * 32 + 2 * 2, 32)
        frames = np.asarray(picture.image.crop((0, 0, 32, 32))).astype(int)
        wanted = Image.fromarray(clip_pixels(row["seed"])[0]).resize((32, 32))
        assert np.abs(frames - np.asarray(wanted)).mean() < 8
    found = Gallery(out, tmp_path / "gallery").refresh()
    assert (found.num_made, found.problems) == (3, ())
    scores = brightness_of(out)
    for row, score in zip(rows_of(out), scores, strict=True):
        pixels = clip_pixels(row["seed"]) @ np.array([0.299, 0.587, 0.114])
        assert score == pytest.approx(pixels.mean(), abs=3)
    compared = RunDiff(out, runs["frames"])
    differences = list(compared)
    if name == "frames":
        assert compared.is_same
    for one in differences:
        assert one.outcome == "different"
        assert one.similarity is not None
        assert one.similarity.psnr > 30


def brightness_of(out: Path) -> list[float]:
    spec = ScoreSpec(
        out=str(out),
        name="light",
        hook="raydiff.score_hooks:brightness",
        arguments={},
        import_dir=".",
    )
    worker = ScoreWorker("w0", spec)
    asyncio.run(worker.start())
    reply = asyncio.run(worker.render(ScoreBatch(rows=tuple(rows_of(out)))))
    assert [one.error for one in reply.scores] == [None] * 3
    return [float(str(one.values["light"])) for one in reply.scores]
