"""Ray, and nothing else in raydiff knows it: a private local cluster and its worker actors.

Every listener binds loopback and asks for a token, and the whole cluster ends with this process.
"""

import asyncio
import fcntl
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydiff.engine.scheduler import BatchDone, Event, WorkerFailed, WorkerReady
from raydiff.engine.worker import Worker, WorkerInfo
from raydiff.errors import EngineError, InputError

OBJECT_STORE_BYTES = 100 * 2**20
"""Batches and replies are small; pixels never pass through Ray."""
SHM = Path("/dev/shm")
FAULT = "Fatal Python error: "
SESSION_PREFIX = "raydiff-"
MAX_TEMP_DIR_LENGTH = 20
"""Ray puts Unix sockets below it, and their paths may have 107 characters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What the cluster has, and each worker takes."""

    num_workers: int
    num_gpus: int
    """GPUs of the cluster; each worker takes one, or none where this is 0."""

    @property
    def per_worker(self) -> dict[str, float]:
        """Ray's options for one worker."""
        return {"num_cpus": 1, "num_gpus": 1 if self.num_gpus else 0}


@dataclass(frozen=True, slots=True)
class _Call:
    """Whose answer a pending reference is."""

    worker_id: str
    incarnation: int

    def failed(self, reason: str, error: InputError | None = None) -> WorkerFailed:
        return WorkerFailed(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            reason=f"worker {self.worker_id}: {reason}",
            error=error,
        )


class WorkerActor:
    """A worker behind Ray. Asynchronous, so that a call is taken while another one runs."""

    def __init__(self, worker_class: type[Any], worker_id: str, spec: Any) -> None:
        self._worker = worker_class(worker_id, spec)

    async def start(self) -> WorkerInfo:
        info: WorkerInfo = await self._worker.start()
        return info

    async def render(self, batch: Any) -> Any:
        return await self._worker.render(batch)

    async def lifetime(self) -> None:
        """Never return: the call fails when the process dies, also while it is idle."""
        await asyncio.Event().wait()


class LocalCluster:
    """A private Ray on this machine, started with the first worker."""

    def __init__(
        self, resources: Resources, spec: Any, *, worker_class: type[Any] = Worker
    ) -> None:
        """A worker is `worker_class(worker_id, spec)`, with `start` and `render` as Worker has."""
        self._resources = resources
        self._worker_class = worker_class
        self._spec = spec
        self._actors: dict[str, Any] = {}
        self._pending: dict[Any, _Call] = {}
        self._pids: dict[str, int] = {}
        self._session = ExitStack()
        self._logs = Path()
        self._ray: Any = None

    def start_worker(self, worker_id: str, incarnation: int) -> None:
        """Place a worker; `poll` reports it ready or failed."""
        if self._ray is None:
            self._ray, self._logs = self._session.enter_context(_local_ray(self._resources))
        # The driver owns replacement and retries: Ray would repeat a deadly batch for ever.
        # Task events feed a dashboard that is not there; they cost a third of a call's time.
        options = {
            "max_restarts": 0,
            "max_task_retries": 0,
            "enable_task_events": False,
            **self._resources.per_worker,
        }
        actor_class = self._ray.remote(WorkerActor).options(**options)
        actor = actor_class.remote(self._worker_class, worker_id, self._spec)
        self._actors[worker_id] = actor
        for ref in (actor.lifetime.remote(), actor.start.remote()):
            self._pending[ref] = _Call(worker_id, incarnation)

    def dispatch(self, worker_id: str, incarnation: int, batch: Any) -> None:
        """Send a batch to a worker; `poll` reports it done, or the worker failed."""
        ref = self._actors[worker_id].render.remote(batch)
        self._pending[ref] = _Call(worker_id, incarnation)

    def stop_worker(self, worker_id: str) -> str:
        """Kill a worker that is late, and say what it was waiting for."""
        asked = self._resources.per_worker
        free = self._ray.available_resources()
        has = {name: self._ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU")}
        self._forget(worker_id)
        return (
            f"it asked for CPU: {asked['num_cpus']}, GPU: {asked['num_gpus']}; the cluster has "
            f"CPU: {has['CPU']:g}, GPU: {has['GPU']:g}, free CPU: {free.get('CPU', 0):g}, "
            f"GPU: {free.get('GPU', 0):g}"
        )

    def poll(self, timeout_s: float) -> list[Event]:
        """Wait for at least one report, at most `timeout_s`; replies come before failures."""
        if not self._pending:
            time.sleep(timeout_s)
            return []
        refs = list(self._pending)
        ready, _ = self._ray.wait(refs, timeout=timeout_s, fetch_local=False)
        if ready:
            ready, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
        events = [self._read(ref, self._pending.pop(ref)) for ref in ready]
        events.sort(key=lambda event: isinstance(event, WorkerFailed))
        for event in events:
            if isinstance(event, WorkerFailed):
                self._forget(event.worker_id)
        return events

    def close(self) -> None:
        """End the workers and the cluster."""
        self._pending.clear()
        self._actors.clear()
        self._session.close()
        self._ray = None

    def _read(self, ref: Any, call: _Call) -> Event:
        errors = self._ray.exceptions
        try:
            value = self._ray.get(ref)
        except errors.RayTaskError as error:
            cause = error.cause
            return call.failed(str(cause), cause if isinstance(cause, InputError) else None)
        except errors.RayActorError as error:
            last_words = self._last_words(call.worker_id)
            return call.failed(f"died: {last_words or _cause_of_death(error)}")
        except errors.RayError as error:
            return call.failed(str(error))
        if isinstance(value, WorkerInfo):
            self._pids[call.worker_id] = value.pid
            return WorkerReady(worker_id=call.worker_id, incarnation=call.incarnation, info=value)
        return BatchDone(worker_id=call.worker_id, incarnation=call.incarnation, reply=value)

    def _last_words(self, worker_id: str) -> str | None:
        """Return what Python's fault handler wrote as the process crashed, if it did."""
        for log in self._logs.glob(f"worker-*-{self._pids.get(worker_id, 0)}.err"):
            for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
                if line.startswith(FAULT):
                    return line.removeprefix(FAULT)
        return None

    def _forget(self, worker_id: str) -> None:
        """Kill what is left of a worker and expect nothing more from it."""
        self._pids.pop(worker_id, None)
        actor = self._actors.pop(worker_id, None)
        if actor is not None:
            self._ray.kill(actor)
        self._pending = {
            ref: call for ref, call in self._pending.items() if call.worker_id != worker_id
        }


def _cause_of_death(error: Exception) -> str:
    """Pick the exit type and the first sentence of the detail out of Ray's long message."""
    found = re.search(r"Worker exit type: (\w+) Worker exit detail: ([^.]*)", str(error))
    if found is None:
        return str(error).split("\n", 1)[0]
    kind, detail = found.groups()
    if kind == "SYSTEM_ERROR":
        return "killed (out of host memory?) or crashed in native code"
    return f"{kind}: {detail}"


# -- the private cluster ---------------------------------------------------------------------------


@contextmanager
def _local_ray(resources: Resources) -> Iterator[tuple[Any, Path]]:
    """Start a Ray of our own, yield the module and its log folder, and end it.

    Other clusters on the machine are left alone.
    """
    _check_shm()
    with _session_dir() as session_dir:
        token_file = session_dir / "token"
        token_file.touch(mode=0o600)
        token_file.write_text(secrets.token_hex(32))
        with _environ(
            # Read when ray is imported: the odd name makes 127.0.0.1 this node's address.
            RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN_PATH=str(token_file),
            RAY_AUTH_TOKEN=None,
            RAY_USAGE_STATS_ENABLED="0",
            # Ray's coming default, which it warns about: GPUs are hidden from workers of none.
            RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="1",
        ):
            ray = _start_ray(resources, session_dir)
            try:
                yield ray, session_dir / "ray" / "session_latest" / "logs"
            finally:
                ray.shutdown()


def _start_ray(resources: Resources, session_dir: Path) -> Any:
    import ray
    from ray._private import ray_constants
    from ray._private import worker as ray_worker
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    if ray.is_initialized():
        raise EngineError(
            "this process is connected to a Ray cluster already, and raydiff starts one of its "
            "own. Call ray.shutdown() first, or render in another process."
        )
    # For a process that imported ray, or ran one, before this: it has read and kept both.
    ray_constants.ENABLE_RAY_CLUSTER = False
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    # Ray prints a worker's death on stdout, which belongs to the command's own answer.
    ray_worker._worker_logs_enabled = False
    try:
        ray.init(
            address="local",
            num_cpus=resources.num_workers,
            num_gpus=resources.num_gpus,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            _temp_dir=f"{session_dir}/ray",
        )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise EngineError(f"Ray {ray.__version__} did not start: {error}") from error
    return ray


def _check_shm() -> None:
    """Refuse a small /dev/shm, as in a container by default: Ray would use slow disk instead."""
    if SHM.is_dir() and shutil.disk_usage(SHM).free < OBJECT_STORE_BYTES:
        free = shutil.disk_usage(SHM).free
        raise EngineError(
            f"{SHM} has {free / 2**20:.0f} MiB free; Ray needs {OBJECT_STORE_BYTES / 2**20:.0f}. "
            "In a container, start it with --shm-size=1g."
        )


@contextmanager
def _session_dir() -> Iterator[Path]:
    """Make a folder for one session, and remove it; also those of drivers that were killed."""
    root = Path(tempfile.gettempdir())
    if len(str(root)) > MAX_TEMP_DIR_LENGTH:
        root = Path("/tmp")
    for folder in root.glob(f"{SESSION_PREFIX}*"):
        with suppress(OSError), (folder / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix=SESSION_PREFIX, dir=root, ignore_cleanup_errors=True
    ) as name:
        folder = Path(name)
        # The lock ends with this process. It gets its name when it is held, not before.
        with (folder / "lock.new").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "lock.new").rename(folder / "lock")
            yield folder


@contextmanager
def _environ(**variables: str | None) -> Iterator[None]:
    """Set environment variables (None removes one) and put the old values back."""
    before = {name: os.environ.get(name) for name in variables}
    _set_environ(variables)
    try:
        yield
    finally:
        _set_environ(before)


def _set_environ(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
