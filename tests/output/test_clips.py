"""Whatever reads a run reads one of clips: the files of every format, whole or damaged."""

import asyncio
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from raydiff.config import OutputConfig
from raydiff.engine.score_worker import ScoreBatch, ScoreSpec, ScoreWorker
from raydiff.output.diff import RunDiff
from raydiff.output.gallery.build import Gallery
from raydiff.output.ledger import Ledger, read_results
from raydiff.output.lock import RunLock
from raydiff.output.media_files import check_media
from raydiff.output.recovery import BOOT_ID_FILE
from raydiff.output.shards.writer import ShardPublisher, ShardWriter
from raydiff.output.sheet.grid import read_grid
from raydiff.output.sheet.pictures import make_picture
from raydiff.output.sheet.sheet import Sheet
from raydiff.output.storage import open_storage
from raydiff.output.verify import Verification
from raydiff.output.video.audio import sound_snr
from raydiff.output.video.clip_files import sound_name
from raydiff.output.video.info import read_video_info
from raydiff.output.video.wav import read_wav
from raydiff.request import RenderResult
from tests.clips import FRAME_RATE, NUM_FRAMES, SAMPLE_RATE, clip_audio, clip_pixels
from tests.output.generated_runs import NO_COLUMNS, clip_rows, request_of, write_run
from tests.s3_server import FaultyS3

# The webdataset library leaves the files that it reads to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

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


def rows_of(out: Path | str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_results(out).to_pylist()
    return rows


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
    num_beside = {"frames": 3 * NUM_FRAMES + 2, "shards": 2}  # one clip is silent
    assert verification.num_files == 3 + num_beside.get(name, 0)


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
        ("frames", ".wav", flip, "wrong_sha256"),
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


def test_damage_of_a_sound_in_a_shard_is_found(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", clip_rows(range(3)), **SETTINGS["shards"])
    (shard,) = (out / "shards").glob("*.tar")
    data = bytearray(shard.read_bytes())
    with tarfile.open(shard) as members:
        second = [one for one in members if one.name.endswith(".wav")][1]
    assert list(Verification(out)) == []
    row = rows_of(out)[1]
    for offset, kind in (
        (second.offset_data + second.size - 1, "wrong_sha256"),
        (second.offset_data, "unreadable_file"),
        (second.offset, "unreadable_file"),
    ):
        damaged = bytearray(data)
        damaged[offset] ^= 1
        shard.write_bytes(damaged)
        (found,) = Verification(out)
        assert (found.kind, found.row_index) == (kind, row["row_index"])
        assert second.name in found.message


def test_a_shard_with_other_bytes_in_a_sound_loses_that_sample(tmp_path: Path) -> None:
    config = OutputConfig(format="webdataset", wav=True)
    writer = ShardWriter(tmp_path, config)
    for row in clip_rows(range(3))[:2]:
        request = request_of(row)
        result = RenderResult(request_id=request.request_id, status="completed")
        writer.write(request, row["pixels"], result, row["audio"])
    (tar,) = (tmp_path / "shards" / ".tmp").glob("*.tar")
    with tarfile.open(tar) as members:
        (wav, kept) = (one for one in members if one.name.endswith(".wav"))
    data = bytearray(tar.read_bytes())
    data[wav.offset_data + wav.size - 1] ^= 1
    tar.write_bytes(data)
    adopted = ShardPublisher(tmp_path, config).adopt(lambda _: False)
    assert [f"{key}.wav" for key in adopted] == [kept.name]


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


def test_clips_in_an_object_store_verify_and_are_shown(s3: FaultyS3) -> None:
    uri = s3.new_uri()
    s3.breaks = lambda method, path: method == "PUT" and "/videos/" in path
    s3.faults = ["503", "reset_after"]
    write_run(uri, clip_rows(range(2)), **SETTINGS["frames"])
    assert not s3.faults
    assert list(Verification(uri)) == []
    first, second = rows_of(uri)
    assert make_picture(uri, second, (24, 24), 2).image is not None
    storage = open_storage(uri)
    storage.delete([sound_name(first["file_name"])])
    storage.put(f"videos/ab/{'ab' * 16}/00000.png", b"x")
    kinds = [(one.kind, one.row_index) for one in Verification(uri)]
    assert kinds == [("missing_file", 0), ("orphan", None)]


# -- shards ----------------------------------------------------------------------------------------


def test_shards_of_clips_load_with_webdataset(runs: dict[str, Path]) -> None:
    rows = {row["request_id"]: row for row in rows_of(runs["shards"])}
    url = str(runs["shards"] / "shards" / "000000.tar")
    samples = list(webdataset.WebDataset(url, shardshuffle=False).decode())
    assert {one["__key__"] for one in samples} == rows.keys()
    for sample in samples:
        row = rows[sample["__key__"]]
        assert row["member"] == f"{sample['__key__']}.mp4"
        assert hashlib.sha256(sample["mp4"]).hexdigest() == row["sha256"]
        info = read_video_info(io.BytesIO(sample["mp4"]))
        assert (info.num_frames, float(info.frame_rate)) == (NUM_FRAMES, FRAME_RATE)
        assert sample["txt"] == sample["json"]["prompt"] == f"clip {row['seed']}"
        assert sample["json"]["num_frames"] == NUM_FRAMES
        is_silent = row["audio_sample_rate"] is None
        assert ("wav" in sample) == (info.audio_codec is not None) == (not is_silent)
        if not is_silent:
            sound = read_wav(io.BytesIO(sample["wav"]))
            assert sound_snr(clip_audio(), sound) > 70


@pytest.mark.parametrize("strip", [False, True])
@pytest.mark.parametrize("has_sound", [True, False])
def test_whole_clips_of_a_killed_worker_are_kept(
    strip: bool, has_sound: bool, tmp_path: Path
) -> None:
    """Cut at the end of any member, and within it: a sample is kept if nothing of it is missing."""
    config = OutputConfig(format="webdataset", wav=has_sound, strip_metadata=strip)
    writer = ShardWriter(tmp_path, config)
    rows = clip_rows(range(3))[:2]
    for row in rows:
        request = request_of(row)
        result = RenderResult(request_id=request.request_id, status="completed", nfe=7)
        assert writer.write(request, row["pixels"], result, row["audio"]) == []
    (tar,) = (tmp_path / "shards" / ".tmp").glob("*.tar")
    data = tar.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as members:
        ends = [one.offset_data + -(-one.size // 512) * 512 for one in members]
    num_members = 1 + has_sound + 2 * (not strip)
    assert len(ends) == 2 * num_members
    for number, end in enumerate(ends, start=1):
        for cut, num_whole in (
            (end, number // num_members),
            (end - 1, (number - 1) // num_members),
        ):
            out = tmp_path / f"cut at {cut}"
            (out / "shards" / ".tmp").mkdir(parents=True)
            (out / "shards" / ".tmp" / tar.name).write_bytes(data[:cut])
            adopted = ShardPublisher(out, config).adopt(lambda _: False)
            assert len(adopted) == num_whole
            for one in adopted.values():
                check_media(out, asdict(one))
                told = (None, None, None) if strip else (NUM_FRAMES / FRAME_RATE, SAMPLE_RATE, 7)
                assert (one.duration_s, one.audio_sample_rate, one.nfe) == told
                assert (one.wav_sha256 is not None) == has_sound


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
