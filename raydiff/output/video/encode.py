"""MP4 and WebM through PyAV, frame by frame: what is in memory is what the encoder looks ahead.

Equal frames, sound and settings give equal bytes: no time stamps, a fixed number of threads.
"""

import math
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.codec.context import Flags
from av.video.reformatter import (
    ColorPrimaries,
    ColorRange,
    Colorspace,
    ColorTrc,
    Interpolation,
    VideoReformatter,
)

from raydiff.config import OutputConfig
from raydiff.output.media import metadata_json
from raydiff.output.video.audio import Audio, fit_audio
from raydiff.output.video.clip import Clip, Frame
from raydiff.output.video.encoders import choose_codec, encoder_options
from raydiff.video_codecs import CODECS, SOUND_ENCODERS

PIXEL_FORMAT = "yuv420p"
AUDIO_BIT_RATE = 192_000
OPUS_RATE = 48_000
"""Opus is 48 kHz inside; given another rate, its encoder begins some milliseconds late."""
MAX_TIMESCALE = 10_000_000
SCALING = (
    Interpolation.BICUBIC
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
)
"""The conversion to YUV is the same on every CPU."""


def encode_video(path: Path, frames: Iterator[Frame], clip: Clip, config: OutputConfig) -> None:
    """Write the frames of `clip` and its sound to `path`. Raises av.FFmpegError."""
    if choose_codec(config) == "av1":
        os.environ.setdefault("SVT_LOG", "1")  # Errors only: SVT-AV1 writes to stderr.
    audio = None
    if clip.audio is not None:
        audio = fit_audio(clip.audio, clip.num_frames, clip.frame_rate)
    container = av.open(
        str(path), "w", format=config.video, container_options=_container_options(clip, config)
    )
    with container:
        if clip.metadata is not None:
            container.metadata["comment"] = metadata_json(clip.metadata)
        picture = _add_picture(container, clip, config)
        sound = None if audio is None else _Sound(container, audio, config)
        to_yuv = VideoReformatter()
        for index, frame in enumerate(frames):
            container.mux(picture.encode(_to_yuv(to_yuv, frame, index, clip.frame_rate)))
            if sound is not None:
                sound.encode_until(Fraction(index + 1) / clip.frame_rate)
        container.mux(picture.encode())
        if sound is not None:
            sound.finish()


def _container_options(clip: Clip, config: OutputConfig) -> dict[str, str]:
    options = {"fflags": "+bitexact"}
    if config.video == "mp4":
        # The beginning of a faststart file says where everything is, so that it plays as it loads.
        options["movflags"] = "+faststart"
        # The default of 1000 would cut durations to milliseconds.
        rate = 1 if clip.audio is None else clip.audio.sample_rate
        timescale = math.lcm(clip.frame_rate.numerator, rate)
        if timescale <= MAX_TIMESCALE:
            options["movie_timescale"] = str(timescale)
    return options


def _add_picture(container: Any, clip: Clip, config: OutputConfig) -> Any:
    name = choose_codec(config)
    stream = container.add_stream(
        CODECS[name].encoder,
        rate=clip.frame_rate,
        options=encoder_options(config, clip.num_frames),
        width=clip.width,
        height=clip.height,
        pix_fmt=PIXEL_FORMAT,
        time_base=1 / clip.frame_rate,
    )
    stream.thread_count = config.video_threads
    stream.codec_context.flags |= Flags.bitexact
    stream.color_range = ColorRange.MPEG
    stream.color_primaries = ColorPrimaries.BT709
    stream.color_trc = ColorTrc.BT709
    stream.colorspace = Colorspace.ITU709
    if name == "hevc":
        stream.codec_context.codec_tag = "hvc1"  # The default, hev1, is not played by Apple's.
    return stream


def _to_yuv(to_yuv: VideoReformatter, frame: Frame, index: int, rate: Fraction) -> Any:
    converted = to_yuv.reformat(
        av.VideoFrame.from_ndarray(frame, format="rgb24"),
        format=PIXEL_FORMAT,
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        interpolation=SCALING,
    )
    converted.pts = index
    converted.time_base = 1 / rate
    return converted


class _Sound:
    """The sound of a clip, encoded beside its frames so that the file plays as it loads."""

    def __init__(self, container: Any, audio: Audio, config: OutputConfig) -> None:
        encoder = SOUND_ENCODERS[config.video]
        rate = OPUS_RATE if encoder == "libopus" else audio.sample_rate
        self._container = container
        self._audio = audio
        self._stream = container.add_stream(
            encoder, rate=rate, layout=audio.layout, time_base=Fraction(1, rate)
        )
        self._stream.bit_rate = AUDIO_BIT_RATE
        self._stream.codec_context.flags |= Flags.bitexact
        self._resampler = av.AudioResampler(self._stream.format, audio.layout, rate)
        self._num_encoded = 0

    def encode_until(self, time_s: Fraction) -> None:
        start = self._num_encoded
        end = min(math.ceil(time_s * self._audio.sample_rate), self._audio.samples.shape[1])
        if end <= start:
            return
        samples = np.ascontiguousarray(self._audio.samples[:, start:end])
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=self._audio.layout)
        frame.sample_rate = self._audio.sample_rate
        frame.time_base = Fraction(1, self._audio.sample_rate)
        frame.pts = start
        self._mux(frame)
        self._num_encoded = end

    def finish(self) -> None:
        self._mux(None)
        self._container.mux(self._stream.encode())

    def _mux(self, frame: Any) -> None:
        for converted in self._resampler.resample(frame):
            self._container.mux(self._stream.encode(converted))
