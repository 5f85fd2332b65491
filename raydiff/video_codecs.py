"""Which codecs a clip's file may have, which encoder makes each, and what that one may be told."""

from dataclasses import dataclass
from typing import Literal

VideoFormat = Literal["mp4", "webm", "gif", "frames"]
CodecName = Literal["h264", "hevc", "av1", "vp9"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Codec:
    """A video codec and FFmpeg's encoder for it."""

    encoder: str
    containers: tuple[VideoFormat, ...]
    crf: int
    """Default: differences are hard to see."""
    max_crf: int
    presets: tuple[str, ...]
    """What the encoder offers, from fast to slow."""
    preset: str


_X_PRESETS = (
    *("ultrafast", "superfast", "veryfast", "faster", "fast"),
    *("medium", "slow", "slower", "veryslow", "placebo"),
)

CODECS: dict[CodecName, Codec] = {
    "h264": Codec(
        encoder="libx264",
        containers=("mp4",),
        crf=18,
        max_crf=51,
        presets=_X_PRESETS,
        preset="medium",
    ),
    "hevc": Codec(
        encoder="libx265",
        containers=("mp4",),
        crf=20,
        max_crf=51,
        presets=_X_PRESETS,
        preset="medium",
    ),
    "av1": Codec(
        encoder="libsvtav1",
        containers=("mp4", "webm"),
        crf=24,
        max_crf=63,
        presets=tuple(str(speed) for speed in range(13, -1, -1)),
        preset="8",
    ),
    "vp9": Codec(
        encoder="libvpx-vp9",
        containers=("webm",),
        crf=24,
        max_crf=63,
        presets=tuple(str(speed) for speed in range(8, -1, -1)),
        preset="4",
    ),
}
DEFAULT_CODECS: dict[VideoFormat, CodecName] = {"mp4": "h264", "webm": "vp9"}
SOUND_ENCODERS: dict[VideoFormat, str] = {"mp4": "aac", "webm": "libopus"}
MAX_GIF_RATE = 50
"""A GIF counts in hundredths of a second, and players show a delay of one as ten."""


def codec_problem(
    video: VideoFormat, codec: CodecName | None, crf: int | None, preset: str | None
) -> str | None:
    """Return why a format, its codec and the encoder's settings do not go together, if so."""
    if video not in DEFAULT_CODECS:
        for name, value in (("codec", codec), ("crf", crf), ("preset", preset)):
            if value is not None:
                return (
                    f"{name} is {value}; an output.video {video} has no such choice. "
                    f"Leave output.{name} out, or use output.video mp4 or webm."
                )
        return None
    chosen = codec or DEFAULT_CODECS[video]
    known = CODECS[chosen]
    if video not in known.containers:
        fitting = [one for one, other in CODECS.items() if video in other.containers]
        return (
            f"codec is {chosen}; the codecs of an output.video {video} are "
            f"{', '.join(fitting)}. Use one of them."
        )
    if crf is not None and not 0 <= crf <= known.max_crf:
        return f"crf is {crf}; {chosen} takes 0 (best) to {known.max_crf} (smallest)."
    if preset is not None and preset not in known.presets:
        return (
            f'preset is "{preset}"; {chosen} takes, from fast to slow, {", ".join(known.presets)}.'
        )
    return None


def rate_problem(video: VideoFormat, frame_rate: float) -> str | None:
    """Return why a format cannot show so many frames a second, if so."""
    if video != "gif" or frame_rate <= MAX_GIF_RATE:
        return None
    return (
        f"is {frame_rate:g}; a GIF shows at most {MAX_GIF_RATE} frames a second. "
        f"Use {MAX_GIF_RATE} or less, or output.video mp4."
    )
