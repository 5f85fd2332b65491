"""What the parts of the engine say to one another. Plain frozen data, no Ray, no torch.

scheduler -> driver: decisions. driver, cluster -> scheduler: events. worker -> driver: replies.
A worker's role is the stages it does; a batch passes the roles of its run one after the other:

    fused                                   encode, denoise and decode in one worker
    encode -> denoise_decode                text encoders elsewhere
    encode -> denoise -> decode             every stage elsewhere

Embeddings and latents never pass through the driver: the cluster hands them on as references.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from raydiff.errors import RaydiffError
from raydiff.request import RenderBatch, RenderRequest, RenderResult, row_guidance

Role = Literal["fused", "encode", "denoise", "denoise_decode", "decode"]

Cause = Literal["start", "process", "node", "hung", "stopped"]
"""start: it never became ready. process: it died at work. node: its node died or was taken away.
hung: it was killed because it did not answer or a batch took far too long. stopped: the driver
ended it on purpose (retired, drained, idle). Only process and hung are held against a batch."""


# -- nouns -----------------------------------------------------------------------------------------


class TextKey(NamedTuple):
    """One text as one checkpoint encodes it: the key of the embedding cache."""

    model: str
    revision: str
    text: str


def texts_of(request: RenderRequest) -> tuple[TextKey, ...]:
    """Return the texts that a request may need encoded, the prompt first.

    Without a negative prompt that is the empty text, also where the checkpoint (SDXL) has zeros
    in its place: whether it has, the denoising worker knows.
    """
    texts = [request.prompt]
    if request.video is None:
        has_negative = request.guidance_scale > 1
    else:
        has_negative = "negative" in row_guidance(request).passes
    if has_negative:
        texts.append(request.negative_prompt or "")
    keys = (TextKey(request.model, request.model_revision, text) for text in texts)
    return tuple(dict.fromkeys(keys))


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A place that one worker can have."""

    worker_id: str
    role: Role = "fused"
    is_elastic: bool = False
    """It may stay empty for as long as its role has another worker: it is filled when a node
    comes, and its waiting actor is what asks an autoscaler for one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerInfo:
    """Where a worker that is ready runs."""

    node: str
    device: str
    pid: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerHealth:
    """A worker's answer to a ping, given also while it renders."""

    rows: int
    """Rows it has rendered so far."""
    busy_s: float
    """Seconds that its render thread has worked so far."""
    vram_used_bytes: int | None = None
    """Of its GPU, by NVML; None without one."""
    gpu_utilization: float | None = None
    """0..1 over the last moments, by NVML; None without a GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeBatch:
    """Texts of one checkpoint to encode together."""

    encode_id: int
    texts: tuple[TextKey, ...]


# -- replies ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeReply:
    """What became of an EncodeBatch; the embeddings themselves stay in the cluster."""

    encode_id: int
    sizes: tuple[int, ...]
    """Bytes of each text's embeddings, in the order of `texts`; 0 where it failed."""
    errors: tuple[str | None, ...]
    encode_s: float
    num_from_disk: int = 0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiseReply:
    """What became of a batch in a `denoise` worker; the latents stay in the cluster."""

    batch_id: int
    request_ids: tuple[str, ...]
    """Rows that have latents, in the order of the latents; the others are in `results`."""
    results: tuple[RenderResult, ...]
    """Rows that failed."""
    max_batch_size: int
    row_warnings: tuple[str | None, ...]
    batch_sizes: tuple[int, ...]
    """Rows of the pass that each row was denoised in: part of how to make it again."""
    encode_s: float
    denoise_s: float
    peak_vram_bytes: int | None
    profile: str
    dtype: str
    latents_bytes: int
    device: str = ""
    """What the rows were denoised on: their results name it."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchReply:
    """What became of a batch whose files are (or will be) written by this worker."""

    batch_id: int
    results: tuple[RenderResult, ...]
    """Rows that have ended for good, those of earlier batches included where files are shards:
    a row without a result here waits in the worker's open shard."""
    max_batch_size: int
    """What this worker takes at the batch's model and size from now on."""
    disk_error: str | None = None
    warnings: tuple[str, ...] = ()
    """What people should be told: a poorer memory profile, say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FlushReply:
    """The rows of the shard that a worker was asked to close."""

    results: tuple[RenderResult, ...]
    disk_error: str | None = None


# -- events ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerPlaced:
    """A worker's process runs on a node and begins to load its model."""

    worker_id: str
    incarnation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerReady:
    """A worker has loaded its model."""

    worker_id: str
    incarnation: int
    info: WorkerInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerLeaving:
    """A worker's node is being drained: nothing new goes there, what it holds may still end."""

    worker_id: str
    incarnation: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerFailed:
    """A worker could not start, died, or was killed."""

    worker_id: str
    incarnation: int
    reason: str
    cause: Cause = "process"
    error: RaydiffError | None = None
    """An error that starting again would not change: a broken checkpoint, a wrong setting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeDone:
    worker_id: str
    incarnation: int
    reply: EncodeReply


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiseDone:
    worker_id: str
    incarnation: int
    reply: DenoiseReply


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchDone:
    worker_id: str
    incarnation: int
    reply: BatchReply


@dataclass(frozen=True, kw_only=True, slots=True)
class FlushDone:
    worker_id: str
    incarnation: int
    reply: FlushReply


@dataclass(frozen=True, kw_only=True, slots=True)
class InputsLost:
    """A batch was not run, because the node that held its embeddings or latents is gone."""

    worker_id: str
    incarnation: int
    batch_id: int


Event = (
    WorkerPlaced
    | WorkerReady
    | WorkerLeaving
    | WorkerFailed
    | EncodeDone
    | DenoiseDone
    | BatchDone
    | FlushDone
    | InputsLost
)


# -- decisions -------------------------------------------------------------------------------------

StopKind = Literal["unplaced", "late", "hung", "retired", "drained"]
"""unplaced: no node took it in time. late: placed, but its model took too long to load. hung: a
batch took far too long. retired: too many failures in a row. drained: its node leaves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartWorker:
    """Place a worker process; WorkerPlaced, then WorkerReady or WorkerFailed is awaited."""

    worker_id: str
    incarnation: int
    role: Role


@dataclass(frozen=True, kw_only=True, slots=True)
class StopWorker:
    """Kill a worker; the driver reports it as WorkerFailed with the matching cause."""

    worker_id: str
    incarnation: int
    kind: StopKind
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Encode:
    """Send texts to an `encode` worker."""

    worker_id: str
    incarnation: int
    batch: EncodeBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Dispatch:
    """Send a batch to a worker; the cluster adds the references that its role needs."""

    worker_id: str
    incarnation: int
    batch: RenderBatch
    denoised: DenoiseReply | None = None
    """For a `decode` worker: what the batch's denoising said. `batch` has those of its rows that
    have not ended meanwhile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Flush:
    """Ask a worker to close its open shard."""

    worker_id: str
    incarnation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DropEmbeds:
    """Let go of embeddings that the cache has no more room for."""

    texts: tuple[TextKey, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class DropLatents:
    """Let go of a batch's latents: it is decoded, or begins anew."""

    batch_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EndRequest:
    """Commit a result."""

    result: RenderResult


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishRun:
    """Nothing is in flight any more; leave the loop."""

    error: RaydiffError | None = None


Decision = (
    StartWorker
    | StopWorker
    | Encode
    | Dispatch
    | Flush
    | DropEmbeds
    | DropLatents
    | EndRequest
    | FinishRun
)
