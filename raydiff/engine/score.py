"""raydiff.score: a hook over the files of a run, on Ray workers; the driver alone commits."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow.compute as pc

from raydiff.config import EngineConfig, RunConfig
from raydiff.engine.cluster import private_session, worker_environ
from raydiff.engine.cluster_file import ClusterLayout
from raydiff.engine.driver import POLL_S, Signals
from raydiff.engine.hook import find_hook
from raydiff.engine.messages import (
    BatchDone,
    Event,
    StartWorker,
    StopWorker,
    WorkerFailed,
    WorkerReady,
)
from raydiff.engine.placement import fused_layout, local_layout
from raydiff.engine.places import MAX_START_FAILURES
from raydiff.engine.scheduler import MAX_CRASHES_WITHOUT_RESULT
from raydiff.engine.score_worker import ScoreBatch, ScoreReply, ScoreSpec, ScoreWorker
from raydiff.engine.worker_pool import WorkerPool
from raydiff.errors import ConfigError, EngineError, RaydiffError
from raydiff.memory.gpus import visible_gpus
from raydiff.output.keys import request_key, request_keys
from raydiff.output.ledger import read_results_schema
from raydiff.output.query import open_results
from raydiff.output.run_file import check_is_run
from raydiff.output.scores import NAME, FileScore, ScoreTable, score_names
from raydiff.output.storage import open_storage

MAX_BATCH_SIZE = 16
BATCHES_PER_WORKER = 4
"""A small run is cut into batches so that each worker gets some."""
MAX_WORKERS = 8
"""On the CPU, where no number is asked for."""
MAX_CRASHES_ALONE = 2
"""Workers that a single file may kill before it gets an error."""
READ_ROWS = 1024

OnProgress = Callable[[int, int], None]
"""Called with the number of files scored and of those to score in this session."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSummary:
    """How a session of scoring ended. Counts are distinct files."""

    out: str
    name: str
    scored: int
    """In this session, those with an error included."""
    errors: int
    """Of them."""
    before: int
    """Scored in earlier sessions."""
    elapsed_s: float
    is_interrupted: bool

    @property
    def exit_status(self) -> int:
        """0: all got a score; 1: some an error; 130: interrupted, the same call continues it."""
        if self.is_interrupted:
            return 130
        return 1 if self.errors else 0


def score(
    out: str | Path,
    hook: str,
    *,
    name: str | None = None,
    arguments: dict[str, Any] | None = None,
    workers: int | Literal["auto"] = "auto",
    use_gpus: bool = False,
    retry_errors: bool = False,
    on_progress: OnProgress | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> ScoreSummary:
    """Call `hook` (module:function) for each distinct file of a run that has no score yet.

    The scores get the name of the function if none is given; `arguments` go to the hook by name.
    Workers are on the CPU, or one on each GPU with `use_gpus`. A run that is being written is
    scored as far as it is committed. Raises InputError where nothing can be scored, EngineError
    where no worker is left; what was scored by then is committed.
    """
    started, arguments = time.monotonic(), arguments or {}
    check_is_run(out)
    find_hook(hook, arguments, str(Path.cwd()))
    name = _checked_name(out, name or hook.partition(":")[2])
    with ScoreTable(out, name, hook=hook, arguments=arguments) as table:
        for warning in table.warnings:
            (on_warning or _ignore)(warning)
        files = _Files(out, table, retry_errors=retry_errors)
        layout = _layout(workers, use_gpus, files.num_waiting)
        spec = ScoreSpec(
            out=open_storage(out).uri,
            name=name,
            hook=hook,
            arguments=arguments,
            import_dir=str(Path.cwd()),
            environ=worker_environ(layout.by_role["fused"]),
        )
        total = files.num_waiting
        num_workers = layout.by_role["fused"].num_workers
        batch_size = -(-total // (BATCHES_PER_WORKER * num_workers))
        with private_session(layout) as session:
            scoring = _Scoring(
                pool=WorkerPool(session, layout, {"fused": spec}, worker_class=ScoreWorker),
                num_workers=num_workers,
                batches=files.batches(min(max(batch_size, 1), MAX_BATCH_SIZE)),
                table=table,
                on_progress=lambda num_scored: (on_progress or _ignore_progress)(num_scored, total),
                on_warning=on_warning or _ignore,
            )
            scoring.run()
        return ScoreSummary(
            out=str(out),
            name=name,
            scored=scoring.num_scored,
            errors=table.num_errors,
            before=files.num_done,
            elapsed_s=time.monotonic() - started,
            is_interrupted=scoring.is_interrupted,
        )


def _checked_name(out: str | Path, name: str) -> str:
    """Refuse a name whose columns, `name` or `name_...`, could meet others of the results."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"--name {name}: use up to 64 letters, digits and _, e.g. --name style")
    for column in read_results_schema(out).names:
        if f"{column}_".startswith(f"{name}_"):
            raise ConfigError(
                f"--name {name}: the results have a column {column!r} already. Choose another."
            )
    for other in score_names(out):
        if other != name and (other.startswith(f"{name}_") or name.startswith(f"{other}_")):
            raise ConfigError(
                f"--name {name}: its columns could meet those of the score {other!r}. "
                "Choose another."
            )
    return name


class _Files:
    """The metadata rows of a run whose files are to be scored, each file once."""

    def __init__(self, out: str | Path, table: ScoreTable, *, retry_errors: bool) -> None:
        self._results = open_results(out)
        self._is_completed = pc.field("status") == "completed"
        ids = self._results.to_table(columns=["request_id"], filter=self._is_completed)
        everything = np.unique(request_keys(ids["request_id"])[0])
        waiting = np.setdiff1d(everything, table.done(with_errors=not retry_errors))
        self.num_waiting = len(waiting)
        self.num_done = len(everything) - len(waiting)
        self._waiting: set[int] = set(waiting.tolist())

    def batches(self, batch_size: int) -> Iterator[ScoreBatch]:
        """Yield the rows in the order of their commit."""
        rows: list[dict[str, Any]] = []
        for batch in self._results.to_batches(filter=self._is_completed, batch_size=READ_ROWS):
            if not self._waiting:
                break
            for row in batch.to_pylist():
                key = request_key(row["request_id"])
                if key not in self._waiting:
                    continue
                self._waiting.remove(key)
                rows.append(row)
                if len(rows) == batch_size:
                    yield ScoreBatch(rows=tuple(rows))
                    rows = []
        if rows:
            yield ScoreBatch(rows=tuple(rows))


@dataclass(eq=False, slots=True)
class _Place:
    """A place for one worker, and the process that has it now."""

    worker_id: str
    state: Literal["empty", "starting", "ready", "lost"] = "empty"
    incarnation: int = 0
    deadline: float = 0.0
    num_start_failures: int = 0
    batch: ScoreBatch | None = None


class _Scoring:
    """Hands each worker one batch at a time, so that blame for a death is certain.

    A batch that killed a worker is cut into single files; a file that kills two gets an error.
    """

    def __init__(
        self,
        *,
        pool: WorkerPool,
        num_workers: int,
        batches: Iterator[ScoreBatch],
        table: ScoreTable,
        on_progress: Callable[[int], None],
        on_warning: Callable[[str], None],
    ) -> None:
        self._pool = pool
        self._places = {f"w{index}": _Place(f"w{index}") for index in range(num_workers)}
        self._batches = batches
        self._queue: deque[ScoreBatch] = deque()
        self._table = table
        self._on_progress = on_progress
        self._on_warning = on_warning
        self._signals = Signals()
        self._num_crashes_without_result = 0
        self._error: RaydiffError | None = None
        self.num_scored = 0

    @property
    def is_interrupted(self) -> bool:
        """Whether SIGINT or SIGTERM has asked it to stop."""
        return self._signals.count > 0

    def run(self) -> None:
        """Score to the end; a signal lets the batches in flight end, a second one does not."""
        try:
            with self._signals:
                self._on_progress(0)
                while self._signals.count < 2 and self._give_out():
                    for event in self._pool.poll(POLL_S):
                        self._handle(event)
                    if self._table.should_commit(time.monotonic()):
                        self._table.commit()
                    self._on_progress(self.num_scored)
            self._table.commit()
        finally:
            self._pool.close()
        if self._error is not None:
            raise self._error

    def _give_out(self) -> bool:
        """Start workers and send batches; return whether an answer is to be waited for."""
        is_draining = self.is_interrupted or self._error is not None
        for place in self._places.values():
            if place.state == "starting" and time.monotonic() >= place.deadline:
                self._stop(place)
            if is_draining or place.batch is not None or not self._has_work():
                continue
            if place.state == "empty":
                self._start(place)
            elif place.state == "ready":
                place.batch = self._queue.popleft()
                self._pool.render(place.worker_id, place.batch)
        is_busy = any(place.batch is not None for place in self._places.values())
        return is_busy or (not is_draining and self._error is None and self._has_work())

    def _has_work(self) -> bool:
        if not self._queue:
            self._queue.extend([one] if (one := next(self._batches, None)) else [])
        return bool(self._queue)

    def _start(self, place: _Place) -> None:
        place.state = "starting"
        place.incarnation += 1
        place.deadline = time.monotonic() + EngineConfig().start_timeout_s
        self._pool.carry_out(
            StartWorker(worker_id=place.worker_id, incarnation=place.incarnation, role="fused")
        )
        self._signals.install()

    def _stop(self, place: _Place) -> None:
        """Kill a worker that is late; its place is not tried again."""
        place.deadline = float("inf")
        place.num_start_failures = MAX_START_FAILURES
        self._pool.carry_out(
            StopWorker(
                worker_id=place.worker_id,
                incarnation=place.incarnation,
                kind="unplaced",
                reason=f"not ready after {EngineConfig().start_timeout_s:g} s",
            )
        )

    def _fail(self, reason: str) -> None:
        self._error = self._error or EngineError(reason)

    def _handle(self, event: Event) -> None:
        place = self._places[event.worker_id]
        if event.incarnation != place.incarnation or place.state in ("empty", "lost"):
            return
        if isinstance(event, WorkerReady):
            place.state = "ready"
            place.num_start_failures = 0
        elif isinstance(event, WorkerFailed):
            self._worker_failed(place, event)
        elif isinstance(event, BatchDone):
            place.batch = None
            self._end(cast(ScoreReply, event.reply).scores)

    def _end(self, scores: list[FileScore]) -> None:
        self._num_crashes_without_result = 0
        self.num_scored += len(scores)
        for one in scores:
            self._table.add(one)

    def _worker_failed(self, place: _Place, event: WorkerFailed) -> None:
        was_starting = place.state == "starting"
        batch, place.batch = place.batch, None
        place.state = "empty"
        if event.error is not None:
            self._error = self._error or event.error
            return
        self._on_warning(event.reason)
        if was_starting:
            place.num_start_failures += 1
            if place.num_start_failures >= MAX_START_FAILURES:
                place.state = "lost"
            if all(one.state == "lost" for one in self._places.values()):
                self._fail(f"no worker could start: {event.reason}")
        elif batch is not None:
            self._crashed(batch, event.reason)

    def _crashed(self, batch: ScoreBatch, reason: str) -> None:
        self._num_crashes_without_result += 1
        if self._num_crashes_without_result >= MAX_CRASHES_WITHOUT_RESULT:
            self._fail(
                f"workers died {self._num_crashes_without_result} times in a row without one "
                f"score; the last: {reason}"
            )
        if len(batch.rows) > 1:
            self._queue.extendleft(ScoreBatch(rows=(row,)) for row in reversed(batch.rows))
        elif batch.num_crashes + 1 < MAX_CRASHES_ALONE:
            self._queue.appendleft(replace(batch, num_crashes=batch.num_crashes + 1))
        else:
            error = f"{MAX_CRASHES_ALONE} workers died of this file; the last: {reason}"
            self._end([FileScore(request_id=batch.rows[0]["request_id"], error=error)])
            self._num_crashes_without_result = 0


def _layout(workers: int | Literal["auto"], use_gpus: bool, num_files: int) -> ClusterLayout:
    if use_gpus:
        gpus = visible_gpus()
        if not gpus:
            raise ConfigError("--gpu: there is no GPU here. Leave it out, to score on the CPU.")
        return local_layout(RunConfig(engine=EngineConfig(workers=workers)), gpus)
    num_useful = max(1, min(len(os.sched_getaffinity(0)), MAX_WORKERS, num_files))
    return fused_layout(num_useful if workers == "auto" else workers)


def _ignore(warning: str) -> None:
    pass


def _ignore_progress(num_scored: int, total: int) -> None:
    pass
