"""The nouns that travel: what is asked (ManifestRow, RenderRequest), what is run together
(RenderBatch) and what became of it (RenderResult). Plain, frozen, picklable; no torch here."""

import hashlib
import json
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, Literal, NamedTuple, TypeVar

from raydiff.video_settings import (
    NUM_REFINE_STEPS,
    RowGuidance,
    StreamGuidance,
    VideoSettings,
)

Task = Literal["txt2img", "img2img", "txt2vid", "img2vid"]
Status = Literal["completed", "failed", "quarantined"]

TASKS: tuple[Task, ...] = ("txt2img", "img2img", "txt2vid", "img2vid")

SAMPLERS: tuple[str, ...] = (
    "ddim",
    "euler",
    "euler_ancestral",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "heun",
    "lms",
    "pndm",
    "unipc",
    "lcm",
)

T = TypeVar("T")

RECIPE_VERSION = 1
"""Part of every request_id; raised when the same request would no longer give the same pixels."""


def quick_to_pickle(noun: type[T]) -> type[T]:
    """Pickle a dataclass with slots as the tuple of its values; its own way takes four times as
    long, and every row is pickled twice."""
    names = [field.name for field in fields(noun)]  # type: ignore[arg-type]
    values = attrgetter(*names)
    setters = [getattr(noun, name).__set__ for name in names]

    def set_state(self: T, state: tuple[Any, ...]) -> None:
        for set_value, value in zip(setters, state, strict=True):
            set_value(self, value)

    noun.__getstate__ = lambda self: values(self)  # type: ignore[method-assign]
    noun.__setstate__ = set_state  # type: ignore[attr-defined]
    return noun


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoModel:
    """What validation needs to know of a checkpoint that makes clips."""

    num_layers: int
    """Blocks of its transformer: those that `stg_blocks` may name."""
    default_stg_block: int
    spatial_downscale: int
    temporal_downscale: int
    """A clip has a multiple of so many frames, and one."""
    has_upsampler: bool
    """Whether it can make clips in two stages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """What validation and planning need to know of a checkpoint, read without torch."""

    name: str
    """As the user wrote it: an alias (`sdxl`), a Hub id or a path."""
    family: str
    """`sd21`, `sdxl` or `ltx2`: which pipeline renders it."""
    path: str
    """Local folder (diffusers layout) or single .safetensors file."""
    revision: str
    """Hub commit, or `local-` and a hash of the files for a local checkpoint."""
    tasks: tuple[Task, ...]
    default_height: int
    default_width: int
    size_multiple: int
    default_num_inference_steps: int
    default_guidance_scale: float
    default_strength: float
    default_sampler: str
    num_parameters: dict[str, int]
    """Parameters of each component (text_encoder, unet, vae, ...), from the file headers."""
    num_fp8_parameters: dict[str, int] = field(default_factory=dict)
    """Those that are stored, and computed with, in fp8."""
    samplers: tuple[str, ...] = SAMPLERS
    video: VideoModel | None = None
    """None for a model of images."""


@quick_to_pickle
@dataclass(frozen=True, kw_only=True, slots=True)
class RenderRequest:
    """One image or clip to make: every value that affects it, validated and complete."""

    model: str
    model_revision: str
    task: Task
    prompt: str
    negative_prompt: str | None
    seed: int
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float
    sampler: str
    strength: float | None = None
    """img2img: share of the schedule that is run, 0..1; None for other tasks."""
    init_image: str | None = None
    """img2img and img2vid: absolute path of the image (already checked to lie inside the input
    root)."""
    init_image_sha256: str | None = None
    video: VideoSettings | None = None
    """None for an image."""
    request_id: str = ""
    """128-bit BLAKE2b of the fields above, in hex; set by `with_request_id`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestRow:
    """One image of one manifest row: the request it asks for, or why it asks for none."""

    row_index: int
    image_index: int
    request: RenderRequest | None
    error: str | None
    extra: Any
    """Columns to pass through: a pyarrow RecordBatch of one row, or None when there are none."""


class BatchKey(NamedTuple):
    """What the requests of a batch must have in common; all else may differ from row to row."""

    model: str
    height: int
    width: int
    num_frames: int | None = None
    """None for images, as the next."""
    frame_rate: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderBatch:
    """Requests of one `BatchKey` that share forward passes."""

    batch_id: int
    key: BatchKey
    requests: tuple[RenderRequest, ...]

    @property
    def model(self) -> str:
        """Whose pipeline is asked for."""
        return self.key.model


@quick_to_pickle
@dataclass(frozen=True, kw_only=True, slots=True)
class RenderResult:
    """What became of one request. Times are seconds of the request's batch, shared by its rows."""

    request_id: str
    status: Status
    error: str | None = None
    warning: str | None = None
    file_name: str | None = None
    """Relative to the output folder, `/` separated: the row's own file, or a shard."""
    sha256: str | None = None
    size_bytes: int | None = None
    member: str | None = None
    """Name of the image or clip in the shard; None where it is the file."""
    offset: int | None = None
    """Where its bytes begin in the shard."""
    duration_s: float | None = None
    """Of a clip."""
    audio_sample_rate: int | None = None
    """Of a clip's sound; None for a silent one."""
    wav_sha256: str | None = None
    """Of the WAV file beside a clip, or after it in a shard."""
    nfe: int | None = None
    """Forward passes of the transformer for a clip, in all its steps and stages."""
    profile: str | None = None
    dtype: str | None = None
    batch_size: int | None = None
    worker_id: str | None = None
    node: str | None = None
    device: str | None = None
    num_threads: int | None = None
    """CPU threads that it was computed with: on a CPU they decide in which order sums are taken."""
    encode_s: float | None = None
    denoise_s: float | None = None
    decode_s: float | None = None
    write_s: float | None = None
    peak_vram_bytes: int | None = None
    finished_at: float | None = None
    """Unix time, seconds."""


def num_denoise_steps(num_inference_steps: int, strength: float) -> int:
    """Return how many of the steps img2img runs at this strength; 0 is too few to render."""
    return min(int(num_inference_steps * strength), num_inference_steps)


def batch_key(request: RenderRequest) -> BatchKey:
    """Return what a request has in common with those that it may share a batch with."""
    video = request.video
    if video is None:
        return BatchKey(request.model, request.height, request.width)
    return BatchKey(
        request.model, request.height, request.width, video.num_frames, video.frame_rate
    )


def row_guidance(request: RenderRequest) -> RowGuidance:
    """Return the guidance of a clip's picture and sound. Raises ValueError for an image."""
    video = video_settings(request)
    return RowGuidance(
        video=StreamGuidance(
            guidance_scale=request.guidance_scale,
            stg_scale=video.stg_scale,
            modality_scale=video.modality_scale,
            guidance_rescale=request.guidance_rescale,
        ),
        audio=StreamGuidance(
            guidance_scale=video.audio_guidance_scale,
            stg_scale=video.audio_stg_scale,
            modality_scale=video.audio_modality_scale,
            guidance_rescale=video.audio_guidance_rescale,
        ),
        stg_blocks=video.stg_blocks,
    )


def num_evaluations(request: RenderRequest) -> int:
    """Return a clip's NFE: forward passes of the transformer for it, in all stages."""
    first = row_guidance(request).num_evaluations(request.num_inference_steps)
    return first + (NUM_REFINE_STEPS if video_settings(request).has_second_stage else 0)


def video_settings(request: RenderRequest) -> VideoSettings:
    """Return a clip's settings. Raises ValueError for an image."""
    if request.video is None:
        raise ValueError(f"{request.model} makes images; a clip's settings were asked for")
    return request.video


def with_request_id(request: RenderRequest) -> RenderRequest:
    """Return the request with its `request_id` set from everything that affects its pixels.

    The name and path under which a model or init image was found are left out where a content
    hash stands for them, so that the same job in another folder has the same identities.
    """
    values = {name: getattr(request, name) for name in _REQUEST_FIELDS}
    identity = {**values, "recipe": RECIPE_VERSION}
    del identity["request_id"], identity["init_image"], identity["video"]
    if request.model_revision.startswith("local-"):
        del identity["model"]
    for name in ("guidance_scale", "guidance_rescale", "strength"):
        identity[name] = _plain_float(identity[name])
    if request.video is not None:  # Images keep the identities from before there were clips.
        identity["video"] = _video_identity(request.video)
    digest = hashlib.blake2b(_CANONICAL_JSON.encode(identity).encode(), digest_size=16)
    return RenderRequest(**{**values, "request_id": digest.hexdigest()})


def _video_identity(video: VideoSettings) -> dict[str, Any]:
    values = {name: getattr(video, name) for name in _VIDEO_FIELDS}
    floats = {name: _plain_float(values[name]) for name in _VIDEO_FLOATS}
    return {**values, **floats, "stg_blocks": sorted(set(video.stg_blocks))}


def _plain_float(value: float | None) -> float | None:
    """Return what is written alike for equal values: 7 is 7.0, and -0.0 is 0.0."""
    return None if value is None else float(value) + 0.0


# Made once: a manifest of a million rows asks for a million identities.
_REQUEST_FIELDS = tuple(field.name for field in fields(RenderRequest))
_VIDEO_FIELDS = tuple(field.name for field in fields(VideoSettings))
_VIDEO_FLOATS = tuple(field.name for field in fields(VideoSettings) if field.type is float)
_CANONICAL_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=True, separators=(",", ":"))
