"""Clips as files: every frame, the rate, the colours, the sound and the request come back."""

import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from raydiff.config import OutputConfig, load_config
from raydiff.errors import ConfigError, DiskError, OutOfMemoryError, RowError
from raydiff.output.frames import read_frames
from raydiff.output.media_files import MediaError
from raydiff.output.media_store import WrittenFile, remove_stale_files
from raydiff.output.storage import Storage, open_storage
from raydiff.output.video.audio import Audio, fit_audio, sound_snr
from raydiff.output.video.clip import Clip, exact_rate
from raydiff.output.video.clip_files import read_frames_index
from raydiff.output.video.clip_reader import open_clip
from raydiff.output.video.info import VideoInfo, read_video_info
from raydiff.output.video.wav import encode_wav, read_wav
from raydiff.output.video.writer import VideoWriter
from tests.s3_server import FaultyS3

REQUEST_ID = "ab" * 15 + "0f"
HEIGHT, WIDTH = 64, 96
NTSC = Fraction(24000, 1001)
METADATA = {"prompt": 'a \x00 b\nc "quoted" \\ 山 é 🏔️', "seed": 2**63 - 1, "guidance_scale": 4.5}
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (90, 120, 200))
CODECS = [
    OutputConfig(codec="h264"),
    OutputConfig(codec="hevc"),
    OutputConfig(codec="av1"),
    OutputConfig(video="webm", codec="vp9"),
    OutputConfig(video="webm", codec="av1"),
]


def name_of(config: OutputConfig) -> str:
    return f"{config.codec or config.video}-{config.video}"


def make_frames(num_frames: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Patches of flat colour, with a bar that says which frame it is: (F, H, W, 3)."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    for index, colour in enumerate(COLOURS):
        frames[:, : height // 2, width * index // 6 : width * (index + 1) // 6] = colour
    for index in range(num_frames):
        frames[index, height // 2 :, : 4 + 2 * index] = 200
    return frames


def make_audio(duration_s: float, sample_rate: int, num_channels: int = 2) -> Audio:
    """A rising tone, another in each channel."""
    time_s = np.arange(round(duration_s * sample_rate)) / sample_rate
    starts = (200, 300)[:num_channels]
    tones = [np.sin(2 * np.pi * (start * time_s + 1000 * time_s**2)) for start in starts]
    return Audio(samples=np.stack(tones).astype(np.float32) / 2, sample_rate=sample_rate)


def make_clip(num_frames: int, frame_rate: Fraction = NTSC, **changes: object) -> Clip:
    values = {
        "request_id": REQUEST_ID,
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": num_frames,
        "frame_rate": frame_rate,
        "metadata": METADATA,
    }
    return Clip(**{**values, **changes})


def save(out: Path, config: OutputConfig, clip: Clip, chunk: int = 4) -> WrittenFile:
    frames = make_frames(clip.num_frames, clip.height, clip.width)
    starts = range(0, len(frames), chunk)
    return VideoWriter(out, config).save(clip, (frames[at : at + chunk] for at in starts))


def read_clip(out: Path | Storage, written: WrittenFile) -> np.ndarray:
    with open_clip(out, asdict(written)) as clip:
        return np.stack(list(clip.frames()))


def info_of(path: Path) -> VideoInfo:
    with path.open("rb") as file:
        return read_video_info(file)


def frames_of(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        return np.stack(list(read_frames(file)))


def sound_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        frames = container.decode(container.streams.audio[0])
        return np.concatenate([frame.to_ndarray() for frame in frames], axis=1)


def files_under(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)


@pytest.mark.parametrize("config", CODECS, ids=name_of)
@pytest.mark.parametrize("sample_rate", [24_000, 48_000])
def test_what_was_asked_comes_back(config, sample_rate, tmp_path):
    audio = make_audio(17 / NTSC, sample_rate)
    written = save(tmp_path, config, make_clip(17, audio=audio))
    path = tmp_path / written.file_name
    data = path.read_bytes()
    assert written.file_name == f"videos/ab/{REQUEST_ID}.{config.video}"
    assert (written.sha256, written.size_bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    assert written.audio_sample_rate == sample_rate
    assert written.duration_s == pytest.approx(17 * 1001 / 24000, abs=1e-9)
    info = info_of(path)
    assert (info.num_frames, info.height, info.width) == (17, HEIGHT, WIDTH)
    assert info.frame_rate == NTSC
    assert info.duration_s == pytest.approx(written.duration_s, abs=1e-9)
    assert (info.video_codec, info.pixel_format) == (config.codec, "yuv420p")
    assert info.audio_codec == ("aac" if config.video == "mp4" else "opus")
    assert info.audio_sample_rate == (sample_rate if config.video == "mp4" else 48_000)
    assert info.audio_duration_s == pytest.approx(written.duration_s, abs=1 / sample_rate)
    assert info.metadata == METADATA
    assert files_under(tmp_path) == [written.file_name]
    difference = np.abs(frames_of(path).astype(int) - make_frames(17))
    assert difference.mean() < 4
    flat = [(HEIGHT // 4, WIDTH * (2 * index + 1) // 12) for index in range(len(COLOURS))]
    assert max(difference[:, y, x].max() for y, x in flat) <= 12
    assert difference[:, HEIGHT - 8, 1:3].max() <= 16


@pytest.mark.parametrize(
    ("video", "sample_rate"), [("mp4", 24_000), ("mp4", 48_000), ("webm", 48_000)]
)
def test_the_sound_begins_with_the_frames(video, sample_rate, tmp_path):
    audio = make_audio(1.0, sample_rate)
    written = save(tmp_path, OutputConfig(video=video), make_clip(24, Fraction(24), audio=audio))
    found = sound_of(tmp_path / written.file_name)
    inner = slice(2000, sample_rate - 2000)
    assert np.abs(found[:, inner] - audio.samples[:, inner]).mean() < 0.02


def test_sound_at_another_rate_begins_with_the_frames_in_a_webm(tmp_path):
    audio = make_audio(1.0, 24_000)
    clip = make_clip(24, Fraction(24), audio=audio)
    written = save(tmp_path, OutputConfig(video="webm"), clip)
    found = sound_of(tmp_path / written.file_name)
    assert found.shape == (2, 48_000)
    inner = slice(2000, 22_000)
    assert np.abs(found[:, ::2][:, inner] - audio.samples[:, inner]).mean() < 0.02


@pytest.mark.parametrize("rate", [30.0, 12.5, 29.97, 7.3])
@pytest.mark.parametrize("num_frames", [1, 2, 9])
def test_any_length_and_rate_is_exact(rate, num_frames, tmp_path):
    rate = exact_rate(rate)
    for config in (OutputConfig(), OutputConfig(codec="hevc"), OutputConfig(video="webm")):
        clip = make_clip(num_frames, rate, audio=make_audio(num_frames / rate, 48_000))
        written = save(tmp_path, config, clip)
        info = info_of(tmp_path / written.file_name)
        assert (info.num_frames, info.frame_rate) == (num_frames, rate)
        assert info.duration_s == pytest.approx(float(num_frames / rate), abs=1e-9)
        assert info.audio_duration_s == pytest.approx(info.duration_s, abs=2e-4)
        if config.video == "mp4":
            with av.open(str(tmp_path / written.file_name)) as container:
                assert container.duration / av.time_base == pytest.approx(info.duration_s, abs=1e-5)


def test_frame_rates_are_the_ones_meant():
    assert {exact_rate(rate) for rate in (23.976, 23.98, 24000 / 1001)} == {NTSC}
    assert exact_rate(29.97) == Fraction(30000, 1001)
    assert exact_rate(59.94) == Fraction(60000, 1001)
    assert [exact_rate(rate) for rate in (24, 25.0, 12.5)] == [24, 25, Fraction(25, 2)]
    assert exact_rate(24.02) == Fraction(1201, 50)


@pytest.mark.parametrize(("made_s", "num_channels"), [(0.5, 2), (2.0, 2), (1.0, 1)])
def test_sound_is_cut_or_padded_to_the_clip(made_s, num_channels, tmp_path):
    audio = make_audio(made_s, 24_000, num_channels)
    clip = make_clip(24, Fraction(24), audio=audio)
    written = save(tmp_path, OutputConfig(wav=True), clip)
    assert info_of(tmp_path / written.file_name).audio_duration_s == 1.0
    with (tmp_path / f"videos/ab/{REQUEST_ID}.wav").open("rb") as file:
        wav = read_wav(file)
    assert (wav.sample_rate, wav.samples.shape) == (24_000, (num_channels, 24_000))
    num_same = min(24_000, audio.samples.shape[1])
    difference = wav.samples[:, :num_same] - audio.samples[:, :num_same]
    assert np.abs(difference).max() <= 1 / 65_536
    assert not wav.samples[:, num_same:].any()
    assert not (made_s == 0.5 and sound_of(tmp_path / written.file_name)[:, 14_000:].max() > 0.01)


def test_a_silent_clip_has_no_sound(tmp_path):
    written = save(tmp_path, OutputConfig(wav=True), make_clip(3))
    info = info_of(tmp_path / written.file_name)
    assert (info.audio_codec, info.audio_sample_rate, info.audio_duration_s) == (None, None, None)
    assert written.audio_sample_rate is None
    assert files_under(tmp_path) == [written.file_name]


def test_an_mp4_says_where_everything_is_before_its_frames(tmp_path):
    data = (tmp_path / save(tmp_path, OutputConfig(), make_clip(9)).file_name).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    hevc = (tmp_path / save(tmp_path, CODECS[1], make_clip(9)).file_name).read_bytes()
    assert b"hvc1" in hevc


def test_a_gif_keeps_its_frames_and_times(tmp_path):
    clip = make_clip(24, Fraction(24), height=63, width=97, audio=make_audio(1.0, 24_000))
    path = tmp_path / save(tmp_path, OutputConfig(video="gif"), clip).file_name
    info = info_of(path)
    assert (info.num_frames, info.height, info.width, info.video_codec) == (24, 63, 97, "gif")
    assert info.duration_s == pytest.approx(1.0, abs=0.011)
    assert info.metadata == METADATA
    wanted = make_frames(24, 63, 97)
    with Image.open(path) as image:
        assert (image.n_frames, image.info["loop"]) == (24, 0)
        for index in range(24):
            image.seek(index)
            difference = np.abs(np.asarray(image.convert("RGB")).astype(int) - wanted[index])
            assert difference.max() <= 8


def test_a_gif_without_a_request_or_of_one_frame_is_whole(tmp_path):
    config = OutputConfig(video="gif", strip_metadata=True)
    info = info_of(tmp_path / save(tmp_path, config, make_clip(1)).file_name)
    assert (info.num_frames, info.metadata) == (1, None)


def test_frames_are_exact_and_listed(tmp_path):
    config = OutputConfig(video="frames", wav=True)
    clip = make_clip(9, height=33, width=17, audio=make_audio(0.3, 48_000))
    written = save(tmp_path, config, clip)
    folder = f"videos/ab/{REQUEST_ID}"
    assert written.file_name == f"{folder}/frames.json"
    data = (tmp_path / written.file_name).read_bytes()
    assert (written.sha256, written.size_bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    index = read_frames_index(data)
    assert (index["num_frames"], Fraction(index["frame_rate"])) == (9, NTSC)
    assert index["request"] == METADATA
    names = [f"{folder}/{number:05d}.png" for number in range(9)]
    assert files_under(tmp_path) == [f"{folder}.wav", *names, written.file_name]
    for name, frame in zip(names, make_frames(9, 33, 17), strict=True):
        with Image.open(tmp_path / name) as image:
            np.testing.assert_array_equal(np.asarray(image), frame)
    (tmp_path / names[3]).write_bytes(b"not a PNG")
    with pytest.raises(MediaError, match=r"00003\.png: not a PNG"):
        read_clip(tmp_path, written)
    (tmp_path / names[3]).unlink()
    with pytest.raises(MediaError, match=r"00003\.png: the file is missing"):
        read_clip(tmp_path, written)
    for wrong in ({}, {**index, "num_frames": 8}, {**index, "files": [{"name": "../x.png"}] * 9}):
        (tmp_path / written.file_name).write_text(json.dumps(wrong))
        with pytest.raises(MediaError, match="not an index"):
            read_clip(tmp_path, written)


@pytest.mark.parametrize("video", ["mp4", "webm", "gif", "frames"])
def test_a_clip_is_read_back_whatever_its_format(video, tmp_path):
    clip = make_clip(9, Fraction(8), audio=make_audio(9 / 8, 24_000))
    config = OutputConfig(video=video, wav=True)
    written = save(tmp_path, config, clip)
    wanted = make_frames(9)
    with open_clip(tmp_path, asdict(written)) as read:
        frames = np.stack(list(read.frames())).astype(int)
        assert np.abs(frames - wanted).mean() < (5 if video != "frames" else 0.5)
        assert np.array_equal(read.spread(3), frames[[0, 4, 8]])
        for still in (read.still(), *read.spread(1)):
            assert min(np.abs(still - frame.astype(int)).mean() for frame in wanted) < 5
        sound = read.sound()
        assert (sound is None) == (video == "gif")
        if sound is not None:
            length_s = sound.samples.shape[1] / sound.sample_rate
            assert length_s == pytest.approx(9 / 8, abs=0.05)
        if video == "frames":
            assert 70 < sound_snr(sound, clip.audio) < math.inf


NOT_FINITE = Audio(samples=np.full((2, 9), np.nan, np.float32), sample_rate=24_000)
EVERY_FORMAT = [*CODECS, OutputConfig(video="gif"), OutputConfig(video="frames")]


def test_equal_clips_give_equal_bytes(tmp_path):
    """At another time, in a process with other cores and other rubbish in fresh memory, and in
    other chunks too."""
    clip = make_clip(40, height=64, width=288, audio=make_audio(1.7, 24_000))
    first = {name_of(one): save(tmp_path / "a", one, clip).sha256 for one in made(tmp_path / "a")}
    code = (
        "import os, sys; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1]); "
        "from pathlib import Path; from tests.output.test_video import *; "
        "clip = make_clip(40, height=64, width=288, audio=make_audio(1.7, 24_000)); "
        f"out = Path({str(tmp_path / 'b')!r}); "
        "print(json.dumps({name_of(one): save(out, one, clip, 7).sha256 for one in made(out)}))"
    )
    time.sleep(1.1)  # Past a whole second: a time stamp would show.
    environ = {**os.environ, "MALLOC_PERTURB_": "85"}  # What glibc fills fresh memory with.
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, check=True, env=environ)
    assert json.loads(done.stdout) == first
    assert done.stderr == b""


def made(folder: Path) -> list[OutputConfig]:
    folder.mkdir()
    return EVERY_FORMAT


@pytest.mark.parametrize("config", EVERY_FORMAT, ids=name_of)
def test_a_stripped_file_holds_nothing_of_the_request(config, tmp_path):
    clip = make_clip(2, metadata={"prompt": "SECRET"})
    written = save(tmp_path, config.model_copy(update={"strip_metadata": True}), clip)
    assert b"SECRET" not in (tmp_path / written.file_name).read_bytes()
    bare = save(tmp_path, config, replace(clip, metadata=None))
    assert bare.sha256 == written.sha256


@pytest.mark.parametrize("video", ["mp4", "webm", "gif"])
def test_a_long_or_broken_prompt_is_embedded(video, tmp_path):
    text = "".join(np.random.default_rng(3).choice(list("abc \x00é山🏔"), 100_000))
    clip = make_clip(1, metadata={"prompt": text, "negative_prompt": "a\udc80b"})
    written = save(tmp_path, OutputConfig(video=video), clip)
    info = info_of(tmp_path / written.file_name)
    assert info.metadata == clip.metadata


def test_one_chunk_is_asked_for_at_a_time(tmp_path):
    """The encoder has had a chunk's frames before the next is made; waiting is not writing."""
    alive = [0, 0]

    class Chunk(np.ndarray):
        def __del__(self) -> None:
            alive[0] -= self.base is None

    def chunks() -> Iterator[np.ndarray]:
        for start in range(0, 40, 4):
            chunk = np.ndarray.__new__(Chunk, (4, HEIGHT, WIDTH, 3), np.uint8)
            chunk[:] = make_frames(40)[start : start + 4]
            alive[0] += 1
            alive[1] = max(alive)
            time.sleep(0.05)
            yield chunk
            del chunk

    started = time.perf_counter()
    written = VideoWriter(tmp_path, OutputConfig(preset="ultrafast")).save(make_clip(40), chunks())
    waited_s = time.perf_counter() - started - written.write_s
    assert info_of(tmp_path / written.file_name).num_frames == 40
    assert alive[1] <= 2
    assert waited_s >= 0.5


@pytest.mark.parametrize("config", EVERY_FORMAT, ids=name_of)
@pytest.mark.parametrize("num_whole", [0, 1, 12])
def test_an_error_of_the_frames_passes_and_leaves_no_video(config, num_whole, tmp_path):
    def chunks() -> Iterator[np.ndarray]:
        yield from (make_frames(1) for _ in range(num_whole))
        raise OutOfMemoryError("no room")

    clip = make_clip(20, audio=make_audio(1.0, 24_000))
    with pytest.raises(OutOfMemoryError, match="no room"):
        VideoWriter(tmp_path, config).save(clip, chunks())
    left = files_under(tmp_path)
    assert left == [] or (config.video == "frames" and "frames.json" not in str(left))


@pytest.mark.parametrize(
    ("chunks", "reason"),
    [
        ([make_frames(2)], "2 frames came; the clip has 3"),
        ([make_frames(2), make_frames(2)], "4 frames came"),
        ([make_frames(3, 32)], "expected uint8"),
        ([make_frames(3).astype(np.float32)], "expected uint8"),
        ([make_frames(1)[0]], "expected uint8"),
    ],
    ids=["few", "many", "size", "float", "no chunk"],
)
def test_frames_that_are_not_the_clips_are_refused(chunks, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        VideoWriter(tmp_path, OutputConfig()).save(make_clip(3), chunks)
    assert files_under(tmp_path) == []


@pytest.mark.parametrize(
    ("video", "changes", "reason"),
    [
        ("mp4", {"height": 63}, r"height is 63; .* even .* Use 62 or 64"),
        ("webm", {"width": 95}, r"width is 95; .* even .* Use 94 or 96"),
        ("gif", {"frame_rate": Fraction(60)}, r"frame_rate is 60; .* at most 50"),
        ("mp4", {"num_frames": 0}, "num_frames is 0"),
        ("mp4", {"audio": NOT_FINITE}, "not finite"),
    ],
)
def test_a_clip_that_a_format_cannot_hold_is_its_rows_error(video, changes, reason, tmp_path):
    clip = make_clip(**{"num_frames": 3, **changes})
    with pytest.raises(RowError, match=reason):
        save(tmp_path, OutputConfig(video=video), clip)
    assert files_under(tmp_path) == []


def test_a_size_that_an_encoder_refuses_is_the_rows_error(tmp_path):
    with pytest.raises(RowError, match=r"the clip of 2x2 could not be encoded: .* Choose another"):
        save(tmp_path, OutputConfig(codec="av1"), make_clip(3, height=2, width=2))
    assert files_under(tmp_path) == []


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"video": "avi"}, r"output\.video: 'avi': .* 'mp4', 'webm', 'gif' or 'frames'"),
        ({"codec": "vp9"}, r"output: codec is vp9; .* mp4 are h264, hevc, av1"),
        ({"video": "webm", "codec": "h264"}, "webm are av1, vp9"),
        ({"video": "gif", "crf": 20}, "crf is 20; an output.video gif has no"),
        ({"crf": 52}, r"crf is 52; h264 takes 0 \(best\) to 51"),
        ({"codec": "av1", "preset": "medium"}, r'preset is "medium"; av1 takes.* 13, 12'),
        ({"codec": "av1", "preset": 14}, r'preset is "14"; av1 takes'),
        ({"video_threads": 0}, r"output\.video_threads: 0"),
        ({"video": "frames", "format": "webdataset"}, "Use output.video mp4, .* or output.format"),
    ],
)
def test_settings_that_do_not_go_together_are_named(values, reason):
    with pytest.raises(ConfigError, match=reason):
        load_config(None, {f"output.{key}": value for key, value in values.items()})


def test_a_missing_encoder_is_named_before_anything_is_rendered(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx265"})
    with pytest.raises(ConfigError, match=r"output.codec is hevc; .* no encoder libx265. Install"):
        VideoWriter(tmp_path, OutputConfig(codec="hevc"))
    VideoWriter(tmp_path, OutputConfig())


def test_crf_and_preset_reach_the_encoder(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (3, HEIGHT, WIDTH, 3), np.uint8)
    for config in CODECS:
        sizes = []
        for crf in (5, 50):
            writer = VideoWriter(tmp_path, config.model_copy(update={"crf": crf}))
            sizes.append(writer.save(make_clip(3), [noise]).size_bytes)
        assert sizes[0] > 3 * sizes[1]
    slow = save(tmp_path, OutputConfig(preset="slow"), make_clip(2))
    data = (tmp_path / slow.file_name).read_bytes()
    assert re.search(rb"subme=8 .*crf=18\.0", data)


@pytest.mark.parametrize("config", EVERY_FORMAT, ids=name_of)
def test_a_full_disk_says_how_to_go_on(config, full_disk):
    frames = np.random.default_rng(0).integers(0, 256, (12, 128, 128, 3), np.uint8)
    clip = make_clip(12, height=128, width=128)
    fine = config if config.video in ("gif", "frames") else config.model_copy(update={"crf": 1})
    with pytest.raises(DiskError, match=r"No space left.*ENOSPC.*Free space.*same") as caught:
        VideoWriter(full_disk, fine).save(clip, [frames])
    assert f"{full_disk}/videos/ab/{REQUEST_ID}" in str(caught.value)
    left = files_under(full_disk)
    assert left == [] or (config.video == "frames" and "frames.json" not in str(left))


def test_a_file_in_the_way_and_a_bad_name_are_named(tmp_path):
    with pytest.raises(DiskError, match=r"request_id is '\.\./x'"):
        save(tmp_path, OutputConfig(), make_clip(1, request_id="../x"))
    (tmp_path / "videos").write_text("not a folder")
    with pytest.raises(DiskError, match=rf"videos/ab/{REQUEST_ID}\.mp4: could not be written"):
        save(tmp_path, OutputConfig(), make_clip(1))


def test_what_a_killed_writer_left_is_removed(tmp_path):
    folder = tmp_path / "videos" / ".tmp"
    folder.mkdir(parents=True)
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    host = re.sub(r"[^\w-]", "-", os.uname().nodename)
    for pid in (child.pid, os.getpid()):
        (folder / f"{REQUEST_ID}.{host}.{pid}.01234567-0.tmp").write_bytes(b"half")
    assert remove_stale_files(tmp_path) == 1
    assert len(files_under(folder)) == 1


def test_a_clip_again_takes_the_place_of_the_first(tmp_path):
    for config in (OutputConfig(), OutputConfig(video="frames")):
        first = save(tmp_path, config, make_clip(3))
        (tmp_path / first.file_name).write_bytes(b"damaged")
        assert save(tmp_path, config, make_clip(3)).sha256 == first.sha256
        data = (tmp_path / first.file_name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == first.sha256


def test_clips_are_written_to_an_object_store(monkeypatch, tmp_path):
    server = FaultyS3()
    try:
        for name, value in server.environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr("tempfile.tempdir", None)
        storage = open_storage(server.new_uri())
        clip = make_clip(5, audio=make_audio(0.3, 24_000))
        for config in (OutputConfig(wav=True), OutputConfig(video="frames")):
            frames = make_frames(5)
            written = VideoWriter(storage.uri, config).save(clip, [frames])
            data = storage.read(written.file_name)
            assert hashlib.sha256(data).hexdigest() == written.sha256
        assert np.array_equal(read_clip(storage, written), make_frames(5))
        assert storage.size(f"videos/ab/{REQUEST_ID}.wav") > 0
        mp4 = storage.read(f"videos/ab/{REQUEST_ID}.mp4")
        assert read_video_info(io.BytesIO(mp4)).num_frames == 5
        assert list(tmp_path.iterdir()) == []
    finally:
        server.close()


def test_wav_values_are_clipped_and_rounded():
    samples = np.array([[0.0, 1.0, -1.0, 2.0, -2.0, 0.5, 1 / 65_535]], np.float32)
    audio = Audio(samples=samples, sample_rate=16_000)
    data = encode_wav(audio)
    read = read_wav(io.BytesIO(data)).samples * 32_768
    assert read.tolist() == [[0, 32_767, -32_768, 32_767, -32_768, 16_384, 1]]
    assert encode_wav(audio) == data


@pytest.mark.parametrize("cut", [0, 20, 50])
def test_a_broken_wav_or_video_is_a_finding(cut):
    data = encode_wav(make_audio(0.01, 24_000))[:cut]
    with pytest.raises(MediaError):
        read_wav(io.BytesIO(data))
    with pytest.raises(MediaError):
        read_video_info(io.BytesIO(data))


def test_audio_of_another_kind_is_refused():
    for samples in (np.zeros((2, 9)), np.zeros(9, np.float32), np.zeros((3, 9), np.float32)):
        with pytest.raises(ValueError, match="expected float32"):
            Audio(samples=samples, sample_rate=24_000)


def test_sounds_are_compared_in_decibels():
    audio = make_audio(0.1, 24_000)
    quiet = Audio(samples=audio.samples + np.float32(0.01), sample_rate=24_000)
    assert sound_snr(audio, audio) == sound_snr(None, None) == math.inf
    power = float((audio.samples**2).mean())
    assert sound_snr(audio, quiet) == pytest.approx(40 + 10 * math.log10(power), abs=0.01)
    silence = Audio(samples=np.zeros_like(audio.samples), sample_rate=24_000)
    assert (sound_snr(audio, silence), sound_snr(silence, audio)) == (0, -math.inf)
    for other in (None, make_audio(0.2, 24_000), make_audio(0.05, 48_000)):
        assert sound_snr(audio, other) == -math.inf


def test_fitting_counts_samples_exactly():
    audio = make_audio(10, 48_000)
    assert fit_audio(audio, 121, NTSC).samples.shape[1] == round(121 * 48_000 * 1001 / 24_000)
