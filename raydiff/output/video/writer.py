"""Videos, named by their request alone, encoded as their frames come; a file for each, or a folder
of frames."""

import hashlib
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import av
import numpy as np
from numpy.typing import NDArray

from raydiff.config import OutputConfig
from raydiff.errors import RowError
from raydiff.output.atomic import REMEDIES, disk_error
from raydiff.output.media_files import FRAMES_INDEX
from raydiff.output.media_store import (
    VIDEOS_DIR,
    MediaStore,
    WrittenFile,
    media_path,
)
from raydiff.output.storage import Storage
from raydiff.output.video.audio import fit_audio
from raydiff.output.video.clip import Clip, Frame, iterate_frames
from raydiff.output.video.clip_files import sound_name
from raydiff.output.video.encode import encode_video
from raydiff.output.video.encoders import check_encoders
from raydiff.output.video.frame_folder import write_frames
from raydiff.output.video.gif import encode_gif
from raydiff.output.video.wav import encode_wav
from raydiff.video_codecs import rate_problem

T = TypeVar("T")


class VideoWriter:
    """Encodes and writes clips; any number of threads and processes may write at once, the same
    clip too. Raises ConfigError if an encoder is missing."""

    def __init__(self, out: str | Path | Storage, config: OutputConfig) -> None:
        check_encoders(config)
        self._store = MediaStore(out, VIDEOS_DIR)
        self._config = config

    def save(self, clip: Clip, chunks: Iterable[NDArray[np.uint8]]) -> WrittenFile:
        """Write a clip from chunks of its frames, each uint8 (F, H, W, 3).

        A chunk is asked for once the one before it is encoded; waiting for one does not count as
        writing. Raises RowError for a clip that
        the format cannot hold, ValueError for frames that are not the clip's, DiskError, and
        whatever `chunks` raises; then there is no video, though frames of a folder may be left.
        """
        check_clip(clip, self._config)
        clip = _as_embedded(clip, self._config)
        started = time.perf_counter()
        waits: list[float] = []
        frames = iterate_frames(_timed(chunks, waits), clip)
        wav_sha256 = self._save_wav(clip)
        file_name, sha256, size_bytes = self._save_frames(clip, frames)
        return WrittenFile(
            file_name=file_name,
            sha256=sha256,
            size_bytes=size_bytes,
            duration_s=clip.duration_s,
            audio_sample_rate=None if clip.audio is None else clip.audio.sample_rate,
            wav_sha256=wav_sha256,
            write_s=time.perf_counter() - started - sum(waits),
        )

    def _save_frames(self, clip: Clip, frames: Iterator[Frame]) -> tuple[str, str, int]:
        """Write the video and return its name, sha256 and size."""
        file_name = video_name(clip.request_id, self._config)
        if self._config.video == "frames":
            folder = file_name.rpartition("/")[0]
            data = write_frames(self._store, folder, frames, clip, self._config)
            self._store.put(file_name, clip.request_id, data)
            return file_name, hashlib.sha256(data).hexdigest(), len(data)
        with self._store.staged(file_name, clip.request_id) as path:
            _encode(path, frames, clip, self._config)
            sha256, size_bytes = _digest(path)
        return file_name, sha256, size_bytes

    def _save_wav(self, clip: Clip) -> str | None:
        """Write the sound, if it is to have a file, and return its sha256."""
        data = encode_sound(clip, self._config)
        if data is None:
            return None
        name = sound_name(video_name(clip.request_id, self._config))
        self._store.put(name, clip.request_id, data)
        return hashlib.sha256(data).hexdigest()


def encode_clip(clip: Clip, chunks: Iterable[NDArray[np.uint8]], config: OutputConfig) -> bytes:
    """Return a clip as the bytes of an mp4, webm or gif. Raises what `VideoWriter.save` does.

    It is encoded into a temporary file: one that plays as it loads is written back and forth.
    """
    check_clip(clip, config)
    with tempfile.TemporaryDirectory(prefix="raydiff-") as folder:
        path = Path(folder) / "clip"
        try:
            _encode(path, iterate_frames(chunks, clip), _as_embedded(clip, config), config)
            return path.read_bytes()
        except OSError as error:
            raise disk_error(path, error) from error


def encode_sound(clip: Clip, config: OutputConfig) -> bytes | None:
    """Return the WAV file that goes with a clip, if one is asked for and it has sound."""
    if clip.audio is None or not config.wav:
        return None
    return encode_wav(fit_audio(clip.audio, clip.num_frames, clip.frame_rate))


def video_name(request_id: str, config: OutputConfig) -> str:
    """Return `videos/ab/<request_id>.mp4`, or the index in the folder of that name.

    Raises DiskError for anything but 32 hex digits.
    """
    path = media_path(VIDEOS_DIR, request_id)
    return f"{path}/{FRAMES_INDEX}" if config.video == "frames" else f"{path}.{config.video}"


def check_clip(clip: Clip, config: OutputConfig) -> None:
    """Raise RowError if the configured format cannot hold a clip."""
    if clip.num_frames < 1 or clip.frame_rate <= 0:
        raise RowError(
            f"num_frames is {clip.num_frames} and frame_rate {clip.frame_rate}; "
            "a video needs more than 0 of both."
        )
    if config.video in ("mp4", "webm"):
        for name in ("height", "width"):
            value = getattr(clip, name)
            if value % 2:
                raise RowError(
                    f"{name} is {value}; a video in yuv420p needs an even one. "
                    f"Use {value - 1} or {value + 1}, or output.video gif or frames."
                )
    problem = rate_problem(config.video, float(clip.frame_rate))
    if problem is not None:
        raise RowError(f"frame_rate {problem}")
    if clip.audio is not None and not np.isfinite(clip.audio.samples).all():
        raise RowError("the sound holds values that are not finite; it cannot be written.")


def _as_embedded(clip: Clip, config: OutputConfig) -> Clip:
    return replace(clip, metadata=None) if config.strip_metadata else clip


def _encode(path: Path, frames: Iterator[Frame], clip: Clip, config: OutputConfig) -> None:
    try:
        if config.video == "gif":
            encode_gif(path, frames, clip)
        else:
            encode_video(path, frames, clip, config)
    except av.FFmpegError as error:
        if error.errno in REMEDIES:
            raise OSError(error.errno, error.strerror) from error
        raise RowError(
            f"the clip of {clip.width}x{clip.height} could not be encoded: {error.strerror}. "
            "Choose another size, output.codec or output.video."
        ) from error


def _timed(chunks: Iterable[T], waits: list[float]) -> Iterator[T]:
    """Yield `chunks`, adding the seconds that each took to come to `waits`."""
    iterator = iter(chunks)
    while True:
        started = time.perf_counter()
        try:
            chunk = next(iterator)
        except StopIteration:
            return
        finally:
            waits.append(time.perf_counter() - started)
        yield chunk


def _digest(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size
