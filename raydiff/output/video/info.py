"""What a video file says of itself, read back: frames, rate, length, sound, and its request."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, BinaryIO

from PIL import Image

from raydiff.output.frames import as_media_errors, opened_video


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """A video as a player sees it."""

    num_frames: int
    height: int
    width: int
    frame_rate: Fraction
    """Of a GIF only nearly what was asked: it counts in hundredths of a second."""
    duration_s: float
    video_codec: str
    pixel_format: str
    audio_codec: str | None
    audio_sample_rate: int | None
    audio_duration_s: float | None
    metadata: dict[str, Any] | None
    """The request inside; None if there is none."""


def read_video_info(file: BinaryIO) -> VideoInfo:
    """Return what an MP4, WebM or GIF is, without decoding its frames. Raises MediaError."""
    with as_media_errors(), opened_video(file) as container:
        picture = container.streams.video[0]
        sound = container.streams.audio[0] if container.streams.audio else None
        packets = [one for one in container.demux(picture) if one.size > 0]
        is_gif = container.format.name == "gif"
        rate = _gif_rate(packets) if is_gif else Fraction(picture.average_rate)
        comment = container.metadata.get("comment", container.metadata.get("COMMENT"))
        return VideoInfo(
            num_frames=len(packets),
            height=picture.height,
            width=picture.width,
            frame_rate=rate,
            duration_s=float(len(packets) / rate),
            video_codec=picture.codec.canonical_name,
            pixel_format=picture.codec_context.pix_fmt or "",
            audio_codec=None if sound is None else sound.codec.canonical_name,
            audio_sample_rate=None if sound is None else sound.sample_rate,
            audio_duration_s=None if sound is None else _sound_s(file, sound),
            metadata=_parsed(_gif_comment(file) if is_gif else comment),
        )


def _sound_s(file: BinaryIO, sound: Any) -> float:
    """Return the length of the sound: as an MP4 states it, for others by decoding it."""
    if sound.duration is not None:
        return float(sound.duration * sound.time_base)
    with opened_video(file) as container:
        frames = container.decode(container.streams.audio[0])
        return float(sum(frame.samples for frame in frames) / sound.sample_rate)


def _gif_rate(packets: Iterable[Any]) -> Fraction:
    delays = [one.duration * one.time_base for one in packets]
    return Fraction(len(delays) / sum(delays))


def _gif_comment(file: BinaryIO) -> str | None:
    file.seek(0)
    with Image.open(file, formats=["GIF"]) as image:
        comment = image.info.get("comment")
    return comment.decode("utf-8", "replace") if isinstance(comment, bytes) else None


def _parsed(text: str | None) -> dict[str, Any] | None:
    try:
        metadata = json.loads(text) if text else None
    except ValueError:
        return None
    return metadata if isinstance(metadata, dict) else None
