"""Requests, events and replies for the scheduler's tests."""

from collections.abc import Sequence
from typing import TypeVar

from raydiff.config import EngineConfig
from raydiff.engine.messages import (
    BatchDone,
    BatchReply,
    Decision,
    DenoiseDone,
    DenoiseReply,
    Dispatch,
    Encode,
    EncodeDone,
    EncodeReply,
    EndRequest,
    Place,
    Role,
    WorkerInfo,
    WorkerReady,
)
from raydiff.engine.scheduler import Scheduler
from raydiff.request import RenderRequest, RenderResult

INFO = WorkerInfo(node="here", device="cpu", pid=1)

D = TypeVar("D")


def request(
    number: int,
    *,
    height: int = 64,
    model: str = "tiny",
    prompt: str | None = None,
    guidance_scale: float = 1.0,
) -> RenderRequest:
    """A request of its own, with a prompt of its own unless one is given."""
    return RenderRequest(
        model=model,
        model_revision="local-0",
        task="txt2img",
        prompt=f"prompt {number}" if prompt is None else prompt,
        negative_prompt=None,
        seed=number,
        height=height,
        width=64,
        num_inference_steps=2,
        guidance_scale=guidance_scale,
        guidance_rescale=0.0,
        sampler="ddim",
        request_id=f"{number:032x}",
    )


def places(**num_workers: int) -> list[Place]:
    """`places(encode=1, denoise=2)` are encode0, denoise0 and denoise1."""
    roles: dict[str, Role] = {
        "fused": "fused",
        "encode": "encode",
        "denoise": "denoise",
        "denoise_decode": "denoise_decode",
        "decode": "decode",
    }
    return [
        Place(worker_id=f"{name}{index}", role=roles[name])
        for name, number in num_workers.items()
        for index in range(number)
    ]


def scheduler(
    of: Sequence[Place],
    rows: Sequence[RenderRequest] = (),
    *,
    is_closed: bool = True,
    embeds_cache_bytes: int = 10**6,
    **config: object,
) -> Scheduler:
    """A scheduler with these places and rows; no others come if it `is_closed`."""
    settings = EngineConfig.model_validate({"batch_size": 4, **config})
    machine = Scheduler(of, settings, embeds_cache_bytes=embeds_cache_bytes)
    for row in rows:
        machine.offer(row)
    if is_closed:
        machine.close_input()
    return machine


def started(machine: Scheduler, now: float = 0.0) -> list[Decision]:
    """Let all workers that are asked for become ready; return what is decided then."""
    decisions = machine.decide(now)
    for worker_id, state in machine.worker_states.items():
        if state == "pending":
            machine.handle(ready(worker_id), now)
    return [one for one in decisions if not hasattr(one, "role")] + machine.decide(now)


def ready(worker_id: str, incarnation: int = 1) -> WorkerReady:
    """The report of a worker that has loaded its model."""
    return WorkerReady(worker_id=worker_id, incarnation=incarnation, info=INFO)


def completed(row: RenderRequest) -> RenderResult:
    """The result of a row that has its file."""
    return RenderResult(request_id=row.request_id, status="completed")


def failure(row: RenderRequest, error: str = "no good") -> RenderResult:
    """The result of a row that failed."""
    return RenderResult(request_id=row.request_id, status="failed", error=error)


def rendered(sent: Dispatch, results: Sequence[RenderResult] | None = None) -> BatchDone:
    """The reply to a batch, of which all rows are completed unless `results` are given."""
    if results is None:
        results = [completed(row) for row in sent.batch.requests]
    reply = BatchReply(batch_id=sent.batch.batch_id, results=tuple(results), max_batch_size=4)
    return BatchDone(worker_id=sent.worker_id, incarnation=sent.incarnation, reply=reply)


def encoded(sent: Encode, errors: dict[str, str] | None = None, size_bytes: int = 10) -> EncodeDone:
    """The reply to texts; those in `errors` could not be encoded."""
    texts, errors = [key.text for key in sent.batch.texts], errors or {}
    reply = EncodeReply(
        encode_id=sent.batch.encode_id,
        sizes=tuple(0 if text in errors else size_bytes for text in texts),
        errors=tuple(errors.get(text) for text in texts),
        encode_s=0.1,
    )
    return EncodeDone(worker_id=sent.worker_id, incarnation=sent.incarnation, reply=reply)


def denoised(
    sent: Dispatch, failures: Sequence[RenderResult] = (), max_batch_size: int = 4
) -> DenoiseDone:
    """The reply to a batch in a denoiser; rows without a failure have latents."""
    failed = {result.request_id for result in failures}
    ids = tuple(row.request_id for row in sent.batch.requests if row.request_id not in failed)
    reply = DenoiseReply(
        batch_id=sent.batch.batch_id,
        request_ids=ids,
        results=tuple(failures),
        max_batch_size=max_batch_size,
        row_warnings=(None,) * len(ids),
        batch_sizes=(len(ids),) * len(ids),
        encode_s=0.0,
        denoise_s=0.1,
        peak_vram_bytes=None,
        profile="cpu_only",
        dtype="float32",
        latents_bytes=1,
    )
    return DenoiseDone(worker_id=sent.worker_id, incarnation=sent.incarnation, reply=reply)


def only(kind: type[D], decisions: Sequence[Decision]) -> list[D]:
    """The decisions of one kind."""
    return [decision for decision in decisions if isinstance(decision, kind)]


def ended(decisions: Sequence[Decision]) -> dict[str, str]:
    """Status by request_id of the rows that end."""
    results = [decision.result for decision in only(EndRequest, decisions)]
    return {result.request_id: result.status for result in results}
