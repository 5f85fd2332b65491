"""The files of a clip beside the one that its row names: the frames that an index lists, and its
sound as a WAV file."""

import io
import json
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from raydiff.output.media_files import MediaError, is_frames_index, next_in_shard, read_media
from raydiff.output.storage import Storage
from raydiff.output.video.wav import read_wav

FRAME_NAME = re.compile(r"\d{5,}\.png")

Row = Mapping[str, Any]


def frame_rows(out: str | Path | Storage, row: Row) -> list[dict[str, Any]]:
    """Return what the index that a row names says of each frame's file, as a row of its own:
    file_name, sha256, size_bytes. Raises MediaError."""
    folder = row["file_name"].rpartition("/")[0]
    return [
        {**entry, "file_name": f"{folder}/{entry['name']}"}
        for entry in read_frames_index(read_media(out, row))["files"]
    ]


def read_frames_index(data: bytes) -> dict[str, Any]:
    """Return an index: num_frames, height, width, frame_rate (a fraction), request, files.

    Raises MediaError.
    """
    try:
        index = json.loads(data)
        Fraction(index["frame_rate"])
        is_whole = len(index["files"]) == index["num_frames"] > 0 and all(
            FRAME_NAME.fullmatch(one["name"]) and one["sha256"] and one["size_bytes"] > 0
            for one in index["files"]
        )
    except (ValueError, KeyError, TypeError):
        is_whole = False
    if not is_whole:
        raise MediaError("not an index of frames")
    return dict(index)


def sound_name(file_name: str) -> str:
    """Return the name of the WAV file beside a clip's file or its folder of frames, or of that
    after a clip in a shard."""
    is_index = is_frames_index(file_name)
    return file_name.rpartition("/" if is_index else ".")[0] + ".wav"


def sound_row(out: str | Path | Storage, row: Row) -> dict[str, Any]:
    """Return the WAV file beside the clip of a row, or after it in its shard, as a row of its own.

    Raises MediaError.
    """
    if row.get("member") is not None:
        return next_in_shard(out, row, sound_name(row["member"]))
    return {"file_name": sound_name(row["file_name"])}


def read_sound_file(out: str | Path | Storage, row: Row) -> bytes:
    """Return the WAV file that goes with the clip of a row.

    Raises MediaError if it is not there, or not as long as the clip.
    """
    data = read_media(out, sound_row(out, row))
    sound = read_wav(io.BytesIO(data))
    if row["duration_s"] is None:  # copied from a shard whose samples do not say it
        return data
    length, wanted = sound.samples.shape[1], round(row["duration_s"] * row["audio_sample_rate"])
    if (sound.sample_rate, length) != (row["audio_sample_rate"], wanted):
        raise MediaError(
            f"it has {length:,} samples at {sound.sample_rate} Hz; the clip has {wanted:,} at "
            f"{row['audio_sample_rate']} Hz"
        )
    return data
