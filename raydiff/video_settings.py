"""What a clip has beside the settings of an image: its length, its sound's guidance, and how often
the transformer is run for it. The names are the manifest's columns."""

from dataclasses import dataclass
from typing import Literal, get_args

VideoMode = Literal["one_stage", "two_stage", "distilled", "distilled_two_stage"]
"""`distilled` are the checkpoints with a schedule of their own and no need of guidance. Two stages:
half the size first, then a few steps at the whole size from what an upsampler makes of that."""
VIDEO_MODES: tuple[VideoMode, ...] = get_args(VideoMode)

TextBackend = Literal["gemma3", "precomputed", "api", "random"]
"""Where the embeddings of a clip's texts come from."""

NUM_DISTILLED_STEPS = 8
NUM_REFINE_STEPS = 3
"""Steps of a second stage."""

PassKind = Literal["negative", "positive", "perturbed", "isolated"]
PASS_KINDS: tuple[PassKind, ...] = get_args(PassKind)
"""In the order in which a batch has them; every row has the positive one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoSettings:
    """The settings of one clip; `guidance_scale` and `guidance_rescale` of its picture are those
    that images have too."""

    video_mode: VideoMode
    text_encoder: TextBackend
    num_frames: int
    frame_rate: float
    """Frames per second."""
    stg_scale: float
    stg_blocks: tuple[int, ...]
    """Blocks whose self attentions the perturbed pass leaves out."""
    modality_scale: float
    audio_guidance_scale: float
    audio_stg_scale: float
    audio_modality_scale: float
    audio_guidance_rescale: float

    @property
    def is_distilled(self) -> bool:
        """Whether the first stage takes the distilled checkpoints' own steps."""
        return is_distilled(self.video_mode)

    @property
    def has_second_stage(self) -> bool:
        """Whether the clip is made at half its size first."""
        return has_second_stage(self.video_mode)


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamGuidance:
    """The scales of one stream of one row; these defaults are no guidance."""

    guidance_scale: float = 1.0
    stg_scale: float = 0.0
    modality_scale: float = 1.0
    guidance_rescale: float = 0.0

    def weight(self, kind: PassKind) -> float:
        """Return how far the prediction moves away from that of the pass."""
        return {
            "negative": self.guidance_scale - 1,
            "positive": 0.0,
            "perturbed": self.stg_scale,
            "isolated": self.modality_scale - 1,
        }[kind]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGuidance:
    """The guidance of one row."""

    video: StreamGuidance = StreamGuidance()
    audio: StreamGuidance = StreamGuidance()
    stg_blocks: tuple[int, ...] = ()
    """Blocks whose self attentions the perturbed pass leaves out."""

    @property
    def passes(self) -> tuple[PassKind, ...]:
        """The passes to run for the row: the positive one, and those that a stream moves from.

        As in the reference a scale on the other side of none, below 1 or below 0, asks for no pass
        by itself.
        """
        return tuple(
            kind
            for kind in PASS_KINDS
            if kind == "positive" or self.video.weight(kind) > 0 or self.audio.weight(kind) > 0
        )

    def num_evaluations(self, num_steps: int) -> int:
        """Return the row's NFE: forward passes of so many steps."""
        return num_steps * len(self.passes)


def is_distilled(mode: VideoMode) -> bool:
    """Whether the first stage takes the distilled checkpoints' own steps."""
    return mode in ("distilled", "distilled_two_stage")


def has_second_stage(mode: VideoMode) -> bool:
    """Whether a clip is made at half its size first."""
    return mode in ("two_stage", "distilled_two_stage")
