"""A worker that scores: it reads a run's files and calls the hook for each, in one thread."""

import asyncio
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raydiff.engine.hook import find_hook, make_hook
from raydiff.engine.messages import WorkerHealth, WorkerInfo
from raydiff.engine.worker import Failure, attempt
from raydiff.errors import ConfigError
from raydiff.output.frames import Pixels, read_image
from raydiff.output.media_files import MediaError, is_clip, media_name, open_media
from raydiff.output.scores import FileScore, Value, columns_of
from raydiff.output.storage import open_storage
from raydiff.output.video.clip_reader import open_clip


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSpec:
    """What a worker is built from; the same for every worker."""

    out: str
    name: str
    hook: str
    arguments: dict[str, Any]
    import_dir: str
    environ: dict[str, str] = field(default_factory=dict)
    """Environment variables to set before the hook is imported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreBatch:
    """Metadata rows whose files one call scores."""

    rows: tuple[dict[str, Any], ...]
    num_crashes: int = 0
    """Workers that died of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreReply:
    """A score, or an error, for each row of a batch."""

    scores: list[FileScore]


class ScoreWorker:
    """Makes its hook once and keeps it."""

    def __init__(self, worker_id: str, spec: ScoreSpec) -> None:
        os.environ.update(spec.environ)
        self._spec = spec
        self._out = open_storage(spec.out)
        # One thread: a model made in it is called from it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="score")

    async def start(self) -> WorkerInfo:
        """Import and make the hook. Raises ConfigError if that fails: it would fail again."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._start_hook)
        return WorkerInfo(node=platform.node(), device="", pid=os.getpid())

    async def render(self, batch: ScoreBatch) -> ScoreReply:
        """Score a batch; a file or a call that fails costs the others nothing."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._score_batch, batch)

    async def health(self) -> WorkerHealth:
        """Answer at once, whatever the hook does."""
        return WorkerHealth(rows=0, busy_s=0.0)

    def _start_hook(self) -> None:
        spec = self._spec
        found = find_hook(spec.hook, spec.arguments, spec.import_dir)
        hook = attempt(make_hook, spec.hook, found, spec.arguments)
        if isinstance(hook, Failure):
            raise ConfigError(f"--with {spec.hook}: it could not be made: {hook.message}")
        self._hook = hook

    def _score_batch(self, batch: ScoreBatch) -> ScoreReply:
        return ScoreReply(scores=[self._score(row) for row in batch.rows])

    def _score(self, row: dict[str, Any]) -> FileScore:
        values = attempt(self._values, row)
        if isinstance(values, Failure):
            message = values.message.encode("utf-8", "backslashreplace").decode("utf-8")
            return FileScore(request_id=row["request_id"], error=message)
        return FileScore(request_id=row["request_id"], values=values)

    def _values(self, row: dict[str, Any]) -> dict[str, Value]:
        return columns_of(self._spec.name, self._hook(self._pixels(row), row))

    def _pixels(self, row: dict[str, Any]) -> Pixels:
        if is_clip(media_name(row)):
            with open_clip(self._out, row) as clip:
                frames = list(clip.frames())
            if not frames:
                raise MediaError("no frame can be decoded")
            return np.stack(frames)  # (F, H, W, 3)
        with open_media(self._out, row) as file:
            return np.array(read_image(file), dtype=np.uint8)  # (H, W, 3)
