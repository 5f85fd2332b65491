"""A worker: one renderer in one thread, and threads that write files beside it.

    batch -> render thread: pixels -> write threads: files -> reply
The render thread takes the next batch while the files of the last one are written. In a split run
a worker does some of the stages, and what it makes goes on to other workers.
"""

import asyncio
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import numpy as np

from raydiff.config import OutputConfig
from raydiff.engine.messages import (
    BatchReply,
    DenoiseReply,
    EncodeBatch,
    EncodeReply,
    FlushReply,
    Role,
    TextKey,
    WorkerHealth,
    WorkerInfo,
)
from raydiff.engine.renderer import DenoisedBatch, Payload, Renderer
from raydiff.errors import DiskError, EngineError, OutOfMemoryError, RaydiffError
from raydiff.memory.gpus import gpu_usage
from raydiff.output.rendered import Rendered
from raydiff.output.video.audio import Audio
from raydiff.output.writer import Writer
from raydiff.request import (
    BatchKey,
    RenderBatch,
    RenderRequest,
    RenderResult,
    num_evaluations,
)

MAX_ERROR_LENGTH = 2000

P = ParamSpec("P")
T = TypeVar("T")


class Sink(Protocol):
    """Where pixels become files; any number of threads may write at once."""

    def write(
        self,
        request: RenderRequest,
        pixels: np.ndarray,
        result: RenderResult,
        audio: Audio | None = None,
    ) -> list[RenderResult]:
        """Take an image, or a clip and its sound, and return the results that are durable now.

        Raises DiskError, and RowError for a clip that the file's format cannot hold.
        """

    def flush(self) -> list[RenderResult]:
        """Make all that was written durable and return its results. Raises DiskError."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """What a worker process is built from; the same for every worker of a role."""

    renderer: str
    """`module:Class`; built with `arguments` and `role` inside the worker."""
    arguments: dict[str, Any] = field(default_factory=dict)
    role: Role = "fused"
    out: str
    output: OutputConfig
    batch_size: int | None = None
    """Largest batch; None asks the renderer."""
    num_write_threads: int = 2
    environ: dict[str, str] = field(default_factory=dict)
    """Environment variables to set before the renderer is imported."""


class Worker:
    """Does its role's stages for batches in the order they come.

    A row that fails has a failed result and costs its batch mates nothing. A stage raises
    EngineError when the worker is of no more use.
    """

    def __init__(self, worker_id: str, spec: WorkerSpec) -> None:
        os.environ.update(spec.environ)
        self._worker_id = worker_id
        self._spec = spec
        self._node = platform.node()
        self._device = ""
        self._num_threads: int | None = None
        self._limits: dict[BatchKey, int] = {}
        self._too_large: set[BatchKey] = set()
        self._sink: Sink = _open_sink(spec, worker_id)
        self._num_rows = 0
        self._busy = _BusyTime()
        # One thread: renders are first in, first out, and CUDA sees a single caller.
        self._render_thread = ThreadPoolExecutor(1, thread_name_prefix="render")
        self._write_threads = ThreadPoolExecutor(spec.num_write_threads, "write")

    async def start(self) -> WorkerInfo:
        """Load the model."""
        self._device = await self._in_render_thread(self._start_renderer)
        self._num_threads = await self._in_render_thread(_num_torch_threads)
        return WorkerInfo(node=self._node, device=self._device, pid=os.getpid())

    async def render(self, batch: RenderBatch) -> BatchReply:
        """Role `fused`: render a batch; the reply comes when its files are written."""
        return await self._write_passes(batch, lambda rows: self._renderer.render(rows))

    async def render_encoded(
        self, batch: RenderBatch, texts: Sequence[TextKey], *embeds: Payload | None
    ) -> BatchReply:
        """Role `denoise_decode`: as `render`, with the embeddings of `texts`."""
        encoded = _by_text(texts, embeds)
        return await self._write_passes(
            batch, lambda rows: self._renderer.render_encoded(rows, encoded)
        )

    async def encode(self, batch: EncodeBatch) -> tuple[EncodeReply, *tuple[Payload | None, ...]]:
        """Role `encode`: return what became of the texts, then each one's embeddings or None."""
        return await self._in_render_thread(self._encode_texts, batch)

    async def denoise(
        self, batch: RenderBatch, texts: Sequence[TextKey], *embeds: Payload | None
    ) -> tuple[DenoiseReply, list[Payload]]:
        """Role `denoise`: return what became of a batch, and the latents of its good rows."""
        return await self._in_render_thread(self._denoise_passes, batch, _by_text(texts, embeds))

    async def decode(
        self, batch: RenderBatch, denoised: DenoiseReply, latents: Sequence[Payload]
    ) -> BatchReply:
        """Role `decode`: decode latents in the order of `denoised` and write the files."""
        rows = dict(zip(denoised.request_ids, latents, strict=True))
        return await self._write_passes(
            batch,
            lambda requests: self._renderer.decode(
                requests, [rows[request.request_id] for request in requests]
            ),
            denoised,
        )

    async def flush(self) -> FlushReply:
        """Close what is open: rows that were held back have ended then."""
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._write_threads, self._sink.flush)
        except DiskError as error:
            return FlushReply(results=(), disk_error=str(error))
        return FlushReply(results=tuple(results))

    async def health(self) -> WorkerHealth:
        """Answer at once, whatever the render thread does."""
        gpu = await asyncio.to_thread(gpu_usage)
        return WorkerHealth(
            rows=self._num_rows,
            busy_s=self._busy.seconds,
            vram_used_bytes=None if gpu is None else gpu.used_bytes,
            gpu_utilization=None if gpu is None else gpu.utilization,
        )

    async def _in_render_thread(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        def timed() -> T:
            with self._busy:
                return call(*args, **kwargs)

        return await asyncio.get_running_loop().run_in_executor(self._render_thread, timed)

    def _start_renderer(self) -> str:
        module, _, name = self._spec.renderer.partition(":")
        build: Callable[..., Renderer] = getattr(import_module(module), name)
        self._renderer = build(**self._spec.arguments, role=self._spec.role)
        return self._renderer.start()

    # -- passes ------------------------------------------------------------------------------------

    def _passes(
        self,
        batch: RenderBatch,
        run: Callable[[Sequence[RenderRequest]], T],
        warnings: list[str],
    ) -> "Iterator[tuple[Sequence[RenderRequest], T | Failure]]":
        """Run a batch in as many passes as memory and bad rows need; only single rows fail.

        A pass that raises is repeated row by row. One that does not fit is halved; a single row
        that does not is tried under poorer memory profiles.
        """
        key = batch.key
        passes = deque([batch.requests])
        while passes:
            requests = passes.popleft()
            limit = attempt(self._limit, key, batch.requests[0])
            if isinstance(limit, Failure):
                if limit.is_out_of_memory and self._step_down(key, warnings):
                    passes.appendleft(requests)
                    continue
                yield from (((request,), limit) for request in requests)
                continue
            if len(requests) > limit:
                passes.appendleft(requests[limit:])
                requests = requests[:limit]
            outcome = attempt(run, requests)
            if not isinstance(outcome, Failure):
                self._num_rows += len(requests)
                yield requests, outcome
            elif outcome.is_out_of_memory and len(requests) > 1:
                self._limits[key] = len(requests) // 2
                passes.appendleft(requests)
            elif outcome.is_out_of_memory and self._step_down(key, warnings):
                passes.appendleft(requests)
            elif len(requests) == 1:
                yield requests, outcome
            else:
                passes.extendleft((request,) for request in reversed(requests))

    def _limit(self, key: BatchKey, request: RenderRequest) -> int:
        if key not in self._limits:
            asked = self._spec.batch_size
            self._limits[key] = asked or max(1, self._renderer.max_batch_size(request))
        return self._limits[key]

    def _step_down(self, key: BatchKey, warnings: list[str]) -> bool:
        """Let the renderer make room for a row of `key`; False where it never will."""
        if key in self._too_large:
            return False
        warning = attempt(self._renderer.step_down)
        self._limits.clear()  # each profile has its own
        if not isinstance(warning, str):
            self._too_large.add(key)
            return False
        warnings.append(warning)
        return True

    # -- stages in the render thread ---------------------------------------------------------------

    def _encode_texts(self, batch: EncodeBatch) -> tuple[EncodeReply, *tuple[Payload | None, ...]]:
        started = time.perf_counter()
        warnings: list[str] = []
        num_from_disk = 0
        embeds: list[Payload | None] = []
        errors: list[str | None] = []
        passes = deque([batch.texts])
        key = BatchKey(batch.texts[0].model, 0, 0)
        while passes:
            texts = passes.popleft()
            outcome = attempt(self._renderer.encode, texts)
            if not isinstance(outcome, Failure):
                self._num_rows += len(texts)
                num_from_disk += outcome.num_from_disk
                if outcome.warning is not None:
                    warnings.append(outcome.warning)
                embeds += outcome.embeds
                errors += [None] * len(texts)
            elif outcome.is_out_of_memory and self._step_down(key, warnings):
                passes.appendleft(texts)
            elif len(texts) > 1:
                passes.extendleft((text,) for text in reversed(texts))
            else:
                embeds.append(None)
                errors.append(outcome.message)
        reply = EncodeReply(
            encode_id=batch.encode_id,
            sizes=tuple(0 if one is None else one.nbytes for one in embeds),
            errors=tuple(errors),
            encode_s=time.perf_counter() - started,
            num_from_disk=num_from_disk,
            warnings=tuple(warnings),
        )
        return reply, *embeds

    def _denoise_passes(
        self, batch: RenderBatch, embeds: Mapping[TextKey, Payload]
    ) -> tuple[DenoiseReply, list[Payload]]:
        warnings: list[str] = []
        failed: list[RenderResult] = []
        passes: list[DenoisedBatch] = []
        rows: list[_LatentsRow] = []
        for requests, outcome in self._passes(
            batch, lambda requests: self._renderer.denoise(requests, embeds), warnings
        ):
            if isinstance(outcome, Failure):
                failed += [self._failed(request, outcome.message) for request in requests]
                continue
            passes.append(outcome)
            for row, request in enumerate(requests):
                error = outcome.errors[row]
                if error is not None:
                    failed.append(self._failed(request, error))
                else:
                    rows.append(
                        _LatentsRow(
                            request.request_id,
                            outcome.latents[row],
                            outcome.warnings[row],
                            len(requests),
                        )
                    )
        reply = DenoiseReply(
            batch_id=batch.batch_id,
            request_ids=tuple(row.request_id for row in rows),
            results=tuple(failed),
            max_batch_size=self._known_limit(batch),
            row_warnings=tuple(row.warning for row in rows),
            batch_sizes=tuple(row.batch_size for row in rows),
            encode_s=sum(one.encode_s for one in passes),
            denoise_s=sum(one.denoise_s for one in passes),
            peak_vram_bytes=_most(one.peak_vram_bytes for one in passes),
            profile=passes[-1].profile if passes else "",
            dtype=passes[-1].dtype if passes else "",
            device=self._device,
            latents_bytes=sum(row.latents.nbytes for row in rows),
            warnings=tuple(warnings),
        )
        return reply, [row.latents for row in rows]

    async def _write_passes(
        self,
        batch: RenderBatch,
        run: Callable[[Sequence[RenderRequest]], Rendered],
        denoised: DenoiseReply | None = None,
    ) -> BatchReply:
        """Render a batch, then wait until its files are written."""
        warnings: list[str] = []

        def render() -> "list[Future[list[RenderResult]]]":
            writes: list[Future[list[RenderResult]]] = []
            for requests, outcome in self._passes(batch, run, warnings):
                if isinstance(outcome, Failure):
                    writes.append(_done([self._failed(one, outcome.message) for one in requests]))
                else:
                    writes.extend(self._start_writes(requests, outcome, denoised))
            return writes

        results: list[RenderResult] = []
        disk_error = None
        for write in await self._in_render_thread(render):
            try:
                rows = await asyncio.wrap_future(write)
                results += rows
            except DiskError as error:
                disk_error = str(error)
        return BatchReply(
            batch_id=batch.batch_id,
            results=tuple(results),
            max_batch_size=self._known_limit(batch),
            disk_error=disk_error,
            warnings=tuple(warnings),
        )

    def _known_limit(self, batch: RenderBatch) -> int:
        return self._limits.get(batch.key, 1)

    # -- writes ------------------------------------------------------------------------------------

    def _start_writes(
        self,
        requests: Sequence[RenderRequest],
        rendered: Rendered,
        denoised: DenoiseReply | None,
    ) -> Iterator["Future[list[RenderResult]]"]:
        """Share a pass's files out over the write threads."""
        num_threads = self._spec.num_write_threads
        for first in range(min(num_threads, len(requests))):
            rows = range(first, len(requests), num_threads)
            yield self._write_threads.submit(self._write_rows, requests, rendered, denoised, rows)

    def _write_rows(
        self,
        requests: Sequence[RenderRequest],
        rendered: Rendered,
        denoised: DenoiseReply | None,
        rows: range,
    ) -> list[RenderResult]:
        results: list[RenderResult] = []
        for row in rows:
            request = requests[row]
            error = rendered.errors[row]
            if error is not None:
                results.append(self._failed(request, error))
                continue
            result = self._completed(requests, rendered, row)
            if denoised is not None:
                result = _with_denoising(result, denoised)
            written = attempt(
                self._sink.write, request, rendered.pixels[row], result, rendered.audio[row]
            )
            if isinstance(written, Failure):
                results.append(self._failed(request, written.message))
            else:
                results += written
        return results

    def _completed(
        self, requests: Sequence[RenderRequest], rendered: Rendered, row: int
    ) -> RenderResult:
        """Return the result of one row, but for what is known once its file is written."""
        request = requests[row]
        return RenderResult(
            request_id=request.request_id,
            status="completed",
            warning=rendered.warnings[row],
            nfe=None if request.video is None else num_evaluations(request),
            profile=rendered.profile,
            dtype=rendered.dtype,
            batch_size=len(requests),
            worker_id=self._worker_id,
            node=self._node,
            device=self._device,
            num_threads=self._num_threads,
            encode_s=rendered.encode_s,
            denoise_s=rendered.denoise_s,
            decode_s=rendered.decode_s,
            peak_vram_bytes=rendered.peak_vram_bytes,
            finished_at=time.time(),
        )

    def _failed(self, request: RenderRequest, error: str) -> RenderResult:
        return RenderResult(
            request_id=request.request_id,
            status="failed",
            error=error,
            worker_id=self._worker_id,
            node=self._node,
            device=self._device,
            finished_at=time.time(),
        )


class _LatentsRow(NamedTuple):
    """A row that was denoised, and the size of the pass it was in."""

    request_id: str
    latents: Payload
    warning: str | None
    batch_size: int


class _BusyTime:
    """Seconds spent inside it, by one thread; read by any."""

    def __init__(self) -> None:
        self._state: tuple[float, float | None] = (0.0, None)  # total, begin of the current stay

    def __enter__(self) -> None:
        self._state = (self._state[0], time.monotonic())

    def __exit__(self, *_: object) -> None:
        self._state = (self.seconds, None)

    @property
    def seconds(self) -> float:
        total, since = self._state
        return total if since is None else total + time.monotonic() - since


class Failure(NamedTuple):
    """Why a call failed, without the exception: its traceback would keep tensors alive."""

    message: str
    is_out_of_memory: bool


def attempt(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | Failure:
    """Call, and turn any error into a Failure, except one that the whole worker shares.

    This is the one place where every exception is caught: a failed request becomes a result.
    """
    try:
        return call(*args, **kwargs)
    except EngineError:
        raise
    except Exception as error:  # noqa: BLE001
        return Failure(_describe(error)[:MAX_ERROR_LENGTH], isinstance(error, OutOfMemoryError))


def _describe(error: Exception) -> str:
    """Say what went wrong; for an error that nobody foresaw, of which type and where."""
    if isinstance(error, RaydiffError):
        return str(error)
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = ""
    if trace is not None:
        where = f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"
    return f"{type(error).__name__}: {error}{where}"


def _num_torch_threads() -> int | None:
    """Return the CPU threads that torch computes with here, None where nothing needs torch."""
    torch = sys.modules.get("torch")
    return None if torch is None else int(torch.get_num_threads())


def _open_sink(spec: WorkerSpec, worker_id: str) -> Sink:
    if spec.output.format == "webdataset":
        from raydiff.output.shards.writer import ShardWriter  # takes what only shards need

        return ShardWriter(spec.out, spec.output, worker_id=worker_id)
    return Writer(spec.out, spec.output)


def _by_text(texts: Sequence[TextKey], embeds: Sequence[Payload | None]) -> dict[TextKey, Payload]:
    pairs = zip(texts, embeds, strict=True)
    return {text: one for text, one in pairs if one is not None}


def _with_denoising(result: RenderResult, denoised: DenoiseReply) -> RenderResult:
    """Add to a decoded row's result what its denoising cost, elsewhere."""
    row = denoised.request_ids.index(result.request_id)
    warnings = [text for text in (denoised.row_warnings[row], result.warning) if text is not None]
    return replace(
        result,
        warning="; ".join(warnings) or None,
        profile=denoised.profile,
        dtype=denoised.dtype,
        batch_size=denoised.batch_sizes[row],
        device=denoised.device,
        encode_s=denoised.encode_s,
        denoise_s=denoised.denoise_s,
        peak_vram_bytes=_most((denoised.peak_vram_bytes, result.peak_vram_bytes)),
    )


def _most(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _done(results: list[RenderResult]) -> "Future[list[RenderResult]]":
    future: Future[list[RenderResult]] = Future()
    future.set_result(results)
    return future
