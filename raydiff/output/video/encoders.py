"""FFmpeg's encoders for a run's clips: whether they are there, and what each is told."""

import av

from raydiff.config import OutputConfig
from raydiff.errors import ConfigError
from raydiff.video_codecs import CODECS, DEFAULT_CODECS, SOUND_ENCODERS, CodecName

MAX_FRAMES_WITHOUT_DELAY = 2
"""x265 4.2 takes the first time stamps of B frames from the third frame; without one they are
whatever was in memory."""


def choose_codec(config: OutputConfig) -> CodecName:
    """Return the codec of an mp4 or webm."""
    return config.codec or DEFAULT_CODECS[config.video]


def check_encoders(config: OutputConfig) -> None:
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


def encoder_options(config: OutputConfig, num_frames: int) -> dict[str, str]:
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
        params = f"pools={config.video_threads}:frame-threads=2:info=0:log-level=none"
        if num_frames <= MAX_FRAMES_WITHOUT_DELAY:
            params += ":bframes=0"
        options["x265-params"] = params
    if name == "av1":
        options["svtav1-params"] = f"lp={min(config.video_threads, 6)}"
    return options


def _can_encode(encoder: str) -> bool:
    try:
        av.Codec(encoder, "w")
    except av.codec.codec.UnknownCodecError:
        return False
    return True
