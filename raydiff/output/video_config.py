"""How a video becomes a file: container, codec, quality; and what each encoder is told."""

from dataclasses import dataclass
from typing import Literal, get_args

import av

from raydiff.errors import ConfigError

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
MAX_FRAMES_WITHOUT_DELAY = 2
"""x265 4.2 takes the first time stamps of B frames from the third frame; without one they are
whatever was in memory."""
SOUND_ENCODERS: dict[VideoFormat, str] = {"mp4": "aac", "webm": "libopus"}


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoConfig:
    """Videos in the output folder. Raises ConfigError for what does not go together."""

    video: VideoFormat = "mp4"
    """A file with sound (mp4, webm), one without (gif), or a folder of PNG files (frames)."""
    codec: CodecName | None = None
    """h264, hevc or av1 in an mp4; vp9 or av1 in a webm. None takes the first of them."""
    crf: int | None = None
    """Lower is better and larger. None takes the codec's default."""
    preset: str | None = None
    """The encoder's own name for its speed. None takes the codec's default."""
    wav: bool = False
    """Write the sound to a WAV file beside the video as well."""
    threads: int = 4
    """Encoder threads of one clip. They are part of what makes the bytes, so that the machine's
    number of cores is not."""
    png_compression: int = 3
    """zlib level of frames: higher is smaller and slower."""
    strip_metadata: bool = False
    """Leave the request out of the file."""

    def __post_init__(self) -> None:
        for name, low, high in (("threads", 1, 64), ("png_compression", 0, 9)):
            if not low <= getattr(self, name) <= high:
                value = getattr(self, name)
                raise ConfigError(f"output.{name} is {value}; it is {low} to {high}.")
        if self.video not in get_args(VideoFormat):
            known = ", ".join(get_args(VideoFormat))
            raise ConfigError(f'output.video is "{self.video}". Use one of {known}.')
        if self.video in ("gif", "frames"):
            for name in ("codec", "crf", "preset"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"output.{name} is {getattr(self, name)}; output.video {self.video} has no "
                        f"such choice. Leave output.{name} out, or use output.video mp4 or webm."
                    )
        else:
            _check_codec(self.video, choose_codec(self), self)


def choose_codec(config: VideoConfig) -> CodecName:
    """Return the codec of an mp4 or webm."""
    return config.codec or DEFAULT_CODECS[config.video]


def check_encoders(config: VideoConfig) -> None:
    """Raise ConfigError if this build of FFmpeg lacks what the configuration asks for."""
    if config.video == "frames":
        return
    wanted = {"video": "gif"}
    if config.video != "gif":
        wanted["codec"] = CODECS[choose_codec(config)].encoder
        wanted["video"] = SOUND_ENCODERS[config.video]
    for field, encoder in wanted.items():
        if encoder not in av.codecs_available or not _can_encode(encoder):
            value = choose_codec(config) if field == "codec" else config.video
            raise ConfigError(
                f"output.{field} is {value}; the FFmpeg that PyAV {av.__version__} was built with "
                f"has no encoder {encoder}. Install PyAV's own wheel (pip install av), or choose "
                f"another output.{field}."
            )


def encoder_options(config: VideoConfig, num_frames: int) -> dict[str, str]:
    """Return the options of an mp4's or webm's encoder, none of which depends on the machine.

    x264 does without its macroblock tree: version 165 reads memory there that it never set, so
    that at most widths the same frames gave other bytes from one time to the next.
    """
    name = choose_codec(config)
    codec = CODECS[name]
    crf = str(codec.crf if config.crf is None else config.crf)
    preset = config.preset or codec.preset
    if name == "vp9":
        return {"crf": crf, "b": "0", "deadline": "good", "cpu-used": preset}
    options = {"crf": crf, "preset": preset}
    if name == "h264":
        options["x264-params"] = "no-mbtree=1"
    if name == "hevc":
        # The stream would name the CPU's instruction sets in its info, and x265 writes to stderr.
        params = f"pools={config.threads}:frame-threads=2:info=0:log-level=none"
        if num_frames <= MAX_FRAMES_WITHOUT_DELAY:
            params += ":bframes=0"
        options["x265-params"] = params
    if name == "av1":
        options["svtav1-params"] = f"lp={min(config.threads, 6)}"
    return options


def _check_codec(video: VideoFormat, name: CodecName, config: VideoConfig) -> None:
    if name not in CODECS or video not in CODECS[name].containers:
        fitting = [one for one, codec in CODECS.items() if video in codec.containers]
        raise ConfigError(
            f"output.codec is {name}; the codecs of an output.video {video} are "
            f"{', '.join(fitting)}. Use one of them."
        )
    codec = CODECS[name]
    if config.crf is not None and not 0 <= config.crf <= codec.max_crf:
        raise ConfigError(
            f"output.crf is {config.crf}; {name} takes 0 (best) to {codec.max_crf} (smallest)."
        )
    if config.preset is not None and config.preset not in codec.presets:
        raise ConfigError(
            f'output.preset is "{config.preset}"; {name} takes, from fast to slow, '
            f"{', '.join(codec.presets)}."
        )


def _can_encode(encoder: str) -> bool:
    try:
        av.Codec(encoder, "w")
    except av.codec.codec.UnknownCodecError:
        return False
    return True
