"""The nouns that travel: what is asked (ManifestRow, RenderRequest), what is run together
(RenderBatch) and what became of it (RenderResult). Plain, frozen, picklable; no torch here."""

import hashlib
import json
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, Literal, TypeVar

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
class ModelInfo:
    """What validation and planning need to know of a checkpoint, read without torch."""

    name: str
    """As the user wrote it: an alias (`sdxl`), a Hub id or a path."""
    family: str
    """`sd21` or `sdxl`: which pipeline renders it."""
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


@quick_to_pickle
@dataclass(frozen=True, kw_only=True, slots=True)
class RenderRequest:
    """One image to make: every value that affects its pixels, validated and complete."""

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
    """img2img: share of the schedule that is run, 0..1; None for txt2img."""
    init_image: str | None = None
    """img2img: absolute path of the image (already checked to lie inside the input root)."""
    init_image_sha256: str | None = None
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


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderBatch:
    """Requests of one model and size that share forward passes."""

    batch_id: int
    model: str
    height: int
    width: int
    requests: tuple[RenderRequest, ...]


@quick_to_pickle
@dataclass(frozen=True, kw_only=True, slots=True)
class RenderResult:
    """What became of one request. Times are seconds of the request's batch, shared by its rows."""

    request_id: str
    status: Status
    error: str | None = None
    warning: str | None = None
    file_name: str | None = None
    """Relative to the output folder, `/` separated: the image's own file, or a shard."""
    sha256: str | None = None
    size_bytes: int | None = None
    member: str | None = None
    """Name of the image in the shard; None where the file is the image."""
    offset: int | None = None
    """Where the image's bytes begin in the shard."""
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


def with_request_id(request: RenderRequest) -> RenderRequest:
    """Return the request with its `request_id` set from everything that affects its pixels.

    The name and path under which a model or init image was found are left out where a content
    hash stands for them, so that the same job in another folder has the same identities.
    """
    values = {name: getattr(request, name) for name in _REQUEST_FIELDS}
    identity = {**values, "recipe": RECIPE_VERSION}
    del identity["request_id"], identity["init_image"]
    if request.model_revision.startswith("local-"):
        del identity["model"]
    for name in ("guidance_scale", "guidance_rescale", "strength"):
        if identity[name] is not None:
            identity[name] = float(identity[name]) + 0.0  # 7 is 7.0, and -0.0 is 0.0
    digest = hashlib.blake2b(_CANONICAL_JSON.encode(identity).encode(), digest_size=16)
    return RenderRequest(**{**values, "request_id": digest.hexdigest()})


# Made once: a manifest of a million rows asks for a million identities.
_REQUEST_FIELDS = tuple(field.name for field in fields(RenderRequest))
_CANONICAL_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=True, separators=(",", ":"))
