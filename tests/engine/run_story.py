"""A small run as its observers are told of it: one worker dies, one row fails, one is completed."""

from dataclasses import replace

from raydiff.engine.messages import (
    BatchDone,
    BatchReply,
    Dispatch,
    EncodeDone,
    EncodeReply,
    StartWorker,
    WorkerFailed,
    WorkerHealth,
    WorkerInfo,
    WorkerReady,
)
from raydiff.engine.observers import Observer
from raydiff.output.progress import Progress
from raydiff.request import RenderBatch, RenderResult

DONE = RenderResult(
    request_id="a1",
    status="completed",
    worker_id="w0",
    batch_size=2,
    encode_s=1.0,
    denoise_s=8.0,
    decode_s=2.0,
    write_s=0.5,
    peak_vram_bytes=3 * 2**30,
)
FAILED = RenderResult(
    request_id="b2", status="failed", error="NaN in latents after step 3", worker_id="w0"
)
REFUSED = RenderResult(request_id="", status="failed", error="height is 500")


def replace_write(result: RenderResult, write_s: float) -> RenderResult:
    """Return the result of a row whose file took `write_s`."""
    return replace(result, write_s=write_s)


def tell_fused(observer: Observer) -> None:
    """Tell of 20 s with one place for a fused worker, of which it was filled for 18."""
    observer.decision(StartWorker(worker_id="w0", incarnation=1, role="fused"), 0.0)
    info = WorkerInfo(node="n", device="cpu", pid=1)
    observer.event(WorkerReady(worker_id="w0", incarnation=1, info=info), 2.0)
    for _ in range(2):  # each call of a dead worker fails
        died = WorkerFailed(worker_id="w0", incarnation=1, reason="worker w0: died: Killed")
        observer.event(died, 6.0)
    observer.decision(StartWorker(worker_id="w0", incarnation=2, role="fused"), 6.0)
    observer.event(WorkerReady(worker_id="w0", incarnation=2, info=info), 6.0)
    health = WorkerHealth(rows=1, busy_s=3.0, vram_used_bytes=2**30, gpu_utilization=0.5)
    observer.health("w0", health, 7.0)
    reply = BatchReply(
        batch_id=1, results=(DONE, DONE, FAILED), max_batch_size=4, warnings=("poorer profile",)
    )
    observer.event(BatchDone(worker_id="w0", incarnation=2, reply=reply), 18.0)
    observer.ended(DONE, 1)
    observer.ended(DONE, 3)
    observer.ended(FAILED, 1)
    observer.ended(REFUSED, 1)
    observer.warning("the disk is slow")
    worker = {"worker_id": "w0", "state": "ready"}
    progress = Progress(
        state="running", total=9, done=4, failed=2, quarantined=0, workers=(worker,)
    )
    observer.progress(progress, {"rows": 3})


def tell_split(observer: Observer, batch: RenderBatch) -> None:
    """Tell of 10 s with an encode worker and one that denoises and decodes."""
    info = WorkerInfo(node="n", device="cpu", pid=1)
    observer.decision(StartWorker(worker_id="e0", incarnation=1, role="encode"), 0.0)
    observer.decision(StartWorker(worker_id="w0", incarnation=1, role="denoise_decode"), 0.0)
    for worker_id in ("e0", "w0"):
        observer.event(WorkerReady(worker_id=worker_id, incarnation=1, info=info), 0.0)
    reply = EncodeReply(
        encode_id=1, sizes=(8, 8, 0), errors=(None, None, "bad"), encode_s=4.0, num_from_disk=1
    )
    observer.event(EncodeDone(worker_id="e0", incarnation=1, reply=reply), 4.0)
    for _ in range(2):
        observer.decision(Dispatch(worker_id="w0", incarnation=1, batch=batch), 4.0)
    done = RenderResult(
        request_id="a1", status="completed", batch_size=1, denoise_s=3.0, decode_s=2.0, write_s=0.1
    )
    reply_w = BatchReply(batch_id=1, results=(done,), max_batch_size=4)
    observer.event(BatchDone(worker_id="w0", incarnation=1, reply=reply_w), 9.0)
    observer.ended(done, 1)
