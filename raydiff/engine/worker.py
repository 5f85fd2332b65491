"""A worker: one renderer in one thread, and threads that write files beside it.

    batch -> render thread: pixels -> write threads: files -> reply
The render thread takes the next batch while the files of the last one are written.
"""

import asyncio
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import numpy as np

from raydiff.config import OutputConfig
from raydiff.errors import DiskError, EngineError, OutOfMemoryError, RaydiffError
from raydiff.output.writer import Writer
from raydiff.request import RenderBatch, RenderRequest, RenderResult

MAX_ERROR_LENGTH = 2000

P = ParamSpec("P")
T = TypeVar("T")


class RenderedBatch(NamedTuple):
    """The images of one batch and what they cost. Seconds are the whole batch's."""

    pixels: Sequence[np.ndarray]
    """uint8 (H, W, 3) per request."""
    warnings: Sequence[str | None]
    encode_s: float
    denoise_s: float
    decode_s: float
    peak_vram_bytes: int | None
    profile: str
    dtype: str


class Renderer(Protocol):
    """Makes pixels. A worker builds it and calls it from one thread only."""

    def start(self) -> str:
        """Load what the first batch needs and return the device's name."""

    def max_batch_size(self, request: RenderRequest) -> int:
        """Return how many requests of this one's model and size may share a batch."""

    def render(self, requests: Sequence[RenderRequest]) -> RenderedBatch:
        """Render requests of one model and size.

        OutOfMemoryError asks for a smaller batch; EngineError says that this process can render
        no more; any other error is blamed on the requests.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """What a worker process is built from; the same for every worker of a run."""

    renderer: str
    """`module:Class`; built with `arguments` inside the worker."""
    arguments: dict[str, Any] = field(default_factory=dict)
    out: str
    output: OutputConfig
    batch_size: int | None = None
    """Largest batch; None asks the renderer."""
    num_write_threads: int = 2
    environ: dict[str, str] = field(default_factory=dict)
    """Environment variables to set before the renderer is imported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerInfo:
    """Where a worker that is ready runs."""

    node: str
    device: str
    pid: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchReply:
    """What became of a batch: a result per request, all of them unless the disk failed."""

    batch_id: int
    results: list[RenderResult]
    max_batch_size: int
    """What this worker takes at the batch's model and size from now on."""
    disk_error: str | None = None


class Worker:
    """Renders batches in the order they come; each reply comes when its files are written."""

    def __init__(self, worker_id: str, spec: WorkerSpec) -> None:
        os.environ.update(spec.environ)
        self._worker_id = worker_id
        self._spec = spec
        self._node = platform.node()
        self._device = ""
        self._limits: dict[tuple[str, int, int], int] = {}
        self._writer = Writer(Path(spec.out), spec.output)
        # One thread: renders are first in, first out, and CUDA sees a single caller.
        self._render_thread = ThreadPoolExecutor(1, thread_name_prefix="render")
        self._write_threads = ThreadPoolExecutor(spec.num_write_threads, "write")

    async def start(self) -> WorkerInfo:
        """Load the model."""
        loop = asyncio.get_running_loop()
        self._device = await loop.run_in_executor(self._render_thread, self._start_renderer)
        return WorkerInfo(node=self._node, device=self._device, pid=os.getpid())

    async def render(self, batch: RenderBatch) -> BatchReply:
        """Render a batch and write its files. Raises EngineError when the worker is of no more use.

        A row that fails has a failed result and costs its batch mates nothing.
        """
        loop = asyncio.get_running_loop()
        writes = await loop.run_in_executor(self._render_thread, self._render_passes, batch)
        results: list[RenderResult] = []
        disk_error = None
        for write in writes:
            try:
                rows = await asyncio.wrap_future(write)
                results += rows
            except DiskError as error:
                disk_error = str(error)
        return BatchReply(
            batch_id=batch.batch_id,
            results=results,
            max_batch_size=self._limits.get(_key(batch), 1),
            disk_error=disk_error,
        )

    def _start_renderer(self) -> str:
        module, _, name = self._spec.renderer.partition(":")
        renderer: Renderer = getattr(import_module(module), name)(**self._spec.arguments)
        self._renderer = renderer
        return renderer.start()

    def _render_passes(self, batch: RenderBatch) -> list["Future[list[RenderResult]]"]:
        """Render in as many passes as memory and bad rows need; return the writes under way.

        A pass that raises is repeated row by row; one that does not fit is halved.
        """
        writes: list[Future[list[RenderResult]]] = []
        passes = deque([batch.requests])
        limit = attempt(self._limit, batch)
        if isinstance(limit, Failure):
            return [_done([self._failed(request, limit) for request in batch.requests])]
        while passes:
            requests = passes.popleft()
            limit = self._limits[_key(batch)]
            if len(requests) > limit:
                passes.appendleft(requests[limit:])
                requests = requests[:limit]
            outcome = attempt(self._renderer.render, requests)
            if isinstance(outcome, RenderedBatch):
                writes.extend(self._start_writes(requests, outcome))
            elif len(requests) == 1:
                writes.append(_done([self._failed(requests[0], outcome)]))
            elif outcome.is_out_of_memory:
                self._limits[_key(batch)] = len(requests) // 2
                passes.appendleft(requests)
            else:
                passes.extendleft((request,) for request in reversed(requests))
        return writes

    def _limit(self, batch: RenderBatch) -> int:
        key = _key(batch)
        if key not in self._limits:
            asked = self._spec.batch_size
            self._limits[key] = asked or max(1, self._renderer.max_batch_size(batch.requests[0]))
        return self._limits[key]

    def _start_writes(
        self, requests: Sequence[RenderRequest], rendered: RenderedBatch
    ) -> Iterator["Future[list[RenderResult]]"]:
        """Share a pass's files out over the write threads."""
        num_threads = self._spec.num_write_threads
        for first in range(min(num_threads, len(requests))):
            rows = range(first, len(requests), num_threads)
            yield self._write_threads.submit(self._write_rows, requests, rendered, rows)

    def _write_rows(
        self, requests: Sequence[RenderRequest], rendered: RenderedBatch, rows: range
    ) -> list[RenderResult]:
        return [self._write_row(requests, rendered, row) for row in rows]

    def _write_row(
        self, requests: Sequence[RenderRequest], rendered: RenderedBatch, row: int
    ) -> RenderResult:
        request = requests[row]
        written = attempt(self._writer.write, request, rendered.pixels[row])
        if isinstance(written, Failure):
            return self._failed(request, written)
        return RenderResult(
            request_id=request.request_id,
            status="completed",
            warning=rendered.warnings[row],
            file_name=written.file_name,
            sha256=written.sha256,
            size_bytes=written.size_bytes,
            profile=rendered.profile,
            dtype=rendered.dtype,
            batch_size=len(requests),
            worker_id=self._worker_id,
            node=self._node,
            device=self._device,
            encode_s=rendered.encode_s,
            denoise_s=rendered.denoise_s,
            decode_s=rendered.decode_s,
            write_s=written.write_s,
            peak_vram_bytes=rendered.peak_vram_bytes,
            finished_at=time.time(),
        )

    def _failed(self, request: RenderRequest, failure: "Failure") -> RenderResult:
        return RenderResult(
            request_id=request.request_id,
            status="failed",
            error=failure.message,
            worker_id=self._worker_id,
            node=self._node,
            device=self._device,
            finished_at=time.time(),
        )


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


def _key(batch: RenderBatch) -> tuple[str, int, int]:
    return batch.model, batch.height, batch.width


def _done(results: list[RenderResult]) -> "Future[list[RenderResult]]":
    future: Future[list[RenderResult]] = Future()
    future.set_result(results)
    return future
