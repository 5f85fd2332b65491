"""Ray, and nothing else in raydiff knows it: a private one on this machine or a cluster to join,
the actors of workers, and what becomes of the nodes.

A private Ray binds loopback and asks for a token, and it ends with this process.
"""

import asyncio
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from raydiff import __version__
from raydiff.engine.cluster_file import ClusterLayout, StagePlacement
from raydiff.engine.messages import WorkerInfo
from raydiff.engine.metrics import Metric
from raydiff.engine.placement import NodeInfo
from raydiff.engine.ray_session import check_shm, check_token, environ, session_dir, write_token
from raydiff.engine.shared_out import check_mark
from raydiff.errors import ConfigError, EngineError
from raydiff.memory.gpus import GpuInfo, visible_gpus

OBJECT_STORE_BYTES = 100 * 2**20
"""Batches and replies are small; pixels never pass through Ray."""
CONNECT_S = 15.0
"""Patience with a cluster's head."""
KNOCK_S = 2.0
"""Patience with a node whose worker has gone silent."""
WATCH_S = 1.0
SILENCE_S = 30.0
"""A head that does not answer for so long is gone; Ray itself ends the process after 60 s."""
MAX_GAP_S = 5.0
"""The driver itself stood still (suspended, or in a slow commit) if it was away for longer."""
PROBE_S = 30.0
"""Patience with a GPU node that is asked about its GPU."""
HEALTH = "health"
"""The concurrency group whose calls are answered while a batch is rendered."""
ZERO_COPY = {"RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}
SPIN_COUNT = "2000"
"""Turns for which a thread waits awake for the others of its worker. With OpenMP's own count a
render on cores that had other work too took 14 times as long; on idle cores it is the same."""
"""For workers that pass tensors on. It imports torch in every process, so others go without."""


# -- workers ---------------------------------------------------------------------------------------


class Whereabouts(NamedTuple):
    """Where a worker's process runs."""

    node_id: str
    address: str
    pid: int
    version: str


class WorkerActor:
    """A worker behind Ray. Asynchronous, so that a call is taken while another one runs."""

    def __init__(
        self, worker_class: type[Any], worker_id: str, spec: Any, mark: Path | None
    ) -> None:
        self._mark = mark
        self._worker = worker_class(worker_id, spec)

    async def where(self) -> Whereabouts:
        import ray

        context = ray.get_runtime_context()
        return Whereabouts(
            context.get_node_id(), ray.util.get_node_ip_address(), os.getpid(), __version__
        )

    async def start(self) -> WorkerInfo:
        if self._mark is not None:
            await asyncio.get_running_loop().run_in_executor(None, check_mark, self._mark)
        info: WorkerInfo = await self._worker.start()
        return info

    async def render(self, batch: Any) -> Any:
        return await self._worker.render(batch)

    async def render_encoded(self, batch: Any, texts: Any, *embeds: Any) -> Any:
        return await self._worker.render_encoded(batch, texts, *embeds)

    async def encode(self, batch: Any) -> Any:
        return await self._worker.encode(batch)

    async def denoise(self, batch: Any, texts: Any, *embeds: Any) -> Any:
        return await self._worker.denoise(batch, texts, *embeds)

    async def decode(self, batch: Any, denoised: Any, latents: Any) -> Any:
        return await self._worker.decode(batch, denoised, latents)

    async def flush(self) -> Any:
        return await self._worker.flush()

    async def health(self) -> Any:
        return await self._worker.health()

    async def lifetime(self) -> None:
        """Never return: the call fails when the process dies, also while it is idle."""
        await asyncio.Event().wait()


class RayMetrics:
    """Metrics that the agent of this node exports, where Ray has one: with `ray[default]`."""

    def __init__(self, definitions: Sequence[Metric], run: str) -> None:
        """`run` becomes a label of each."""
        from ray.util import metrics

        self._metrics: dict[str, Any] = {}
        for one in definitions:
            labels = (*one.labels, "run")
            if one.kind == "histogram":
                metric = metrics.Histogram(
                    one.name, one.description, boundaries=list(one.boundaries), tag_keys=labels
                )
            else:
                kind = metrics.Counter if one.kind == "counter" else metrics.Gauge
                metric = kind(one.name, one.description, tag_keys=labels)
            metric.set_default_tags({"run": run})
            self._metrics[one.name] = metric

    def add(self, name: str, amount: float, labels: Mapping[str, str]) -> None:
        self._metrics[name].inc(amount, dict(labels))

    def set(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self._metrics[name].set(value, dict(labels))

    def observe(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self._metrics[name].observe(value, dict(labels))


# -- the connection --------------------------------------------------------------------------------


class RaySession:
    """This process's connection to a Ray; opened when it is first needed, and watched from then."""

    def __init__(
        self, open_ray: Callable[[], AbstractContextManager[Any]], *, is_private: bool
    ) -> None:
        self._open_ray = open_ray
        self._stack = ExitStack()
        self._ray: Any = None
        self._watch: _Watch | None = None
        self._node_id = ""
        self._unanswering: set[str] = set()
        """Nodes that have been found dead before the head said so."""
        self.logs = Path()
        """Log folder of this node."""
        self.is_private = is_private
        """Whether it has this machine alone, and ends with this process."""

    def open(self) -> Any:
        """Connect if that is not done yet, and return the module `ray`."""
        if self._ray is None:
            ray = self._stack.enter_context(self._open_ray())
            self._node_id = ray.get_runtime_context().get_node_id()
            self.logs = Path(ray._private.worker._global_node.get_logs_dir_path())
            self._watch = self._stack.enter_context(_watch(ray))
            self._ray = ray
        return self._ray

    def close(self) -> None:
        """Disconnect; a private Ray ends."""
        self._ray, self._watch = None, None
        self._stack.close()

    def __enter__(self) -> "RaySession":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def nodes(self) -> list[NodeInfo]:
        """The nodes that are alive."""
        self.open()
        return list(self._watched.nodes.values())

    @property
    def draining(self) -> set[str]:
        """Ids of the nodes that will soon be gone."""
        return {node.node_id for node in self._watched.nodes.values() if node.is_draining}

    def metrics(self, definitions: Sequence[Metric], *, run: str) -> "RayMetrics | None":
        """Return what counts for Prometheus; None before there is a Ray to export it."""
        return None if self._ray is None else RayMetrics(definitions, run)

    def is_alive(self, node_id: str) -> bool:
        """Return whether a node was alive a moment ago."""
        return node_id in self._watched.nodes and node_id not in self._unanswering

    def still_answers(self, node_id: str) -> bool:
        """Return whether a node's raylet takes a connection: the head learns late of a death."""
        if self.is_alive(node_id):
            node = self._watched.nodes[node_id]
            try:
                socket.create_connection((node.address, node.port), timeout=KNOCK_S).close()
            except OSError:
                self._unanswering.add(node_id)
        return self.is_alive(node_id)

    def check_alive(self) -> None:
        """Raise EngineError if the cluster's head has not answered for too long."""
        silent_s = self._watched.silent_s()
        if silent_s > SILENCE_S:
            raise EngineError(
                f"the head of the Ray cluster has not answered for {silent_s:.0f} s. What had "
                "ended is committed; the same command continues the run."
            )

    def start_actor(
        self,
        placement: StagePlacement,
        worker_class: type[Any],
        worker_id: str,
        spec: Any,
        mark: Path | None,
    ) -> Any:
        """Place a worker actor; its calls wait until a node takes it."""
        # The driver owns replacement and retries: Ray would repeat a deadly batch for ever.
        # Task events feed a dashboard that is not there; they cost a third of a call's time.
        options: dict[str, Any] = {
            "max_restarts": 0,
            "max_task_retries": 0,
            "enable_task_events": False,
            "num_cpus": placement.num_cpus,
            "num_gpus": placement.num_gpus,
        }
        if not self.is_private:
            # Processes of a private Ray have their environment from its start.
            options |= {
                "resources": placement.custom_resources,
                "label_selector": placement.labels,
                "runtime_env": {"env_vars": spec.environ},
            }
            if placement.memory_bytes is not None:
                options["memory"] = placement.memory_bytes
        actor_class = self.open().remote(concurrency_groups={HEALTH: 4})(WorkerActor)
        return actor_class.options(**options).remote(worker_class, worker_id, spec, mark)

    def kill(self, actor: Any, where: Whereabouts | None, *, is_stuck: bool) -> None:
        """End an actor's process; a stuck one (stopped, say) by a signal on its node too."""
        ray = self.open()
        ray.kill(actor)
        if where is None:
            return
        if where.node_id == self._node_id:
            end_process(where.pid)
        elif is_stuck and self.is_alive(where.node_id):
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            on_its_node = NodeAffinitySchedulingStrategy(where.node_id, soft=False)
            task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=on_its_node)
            task(end_process).remote(where.pid)

    def unmet(self, placement: StagePlacement) -> str:
        """Say what a worker asks for that no node has free."""
        asked = [f"{kind}: {amount}" for kind, amount in placement.resources.items() if amount]
        if placement.labels and not self.is_private:
            asked.append(f"labels {placement.labels}")
        free = self.open().available_resources()
        has = [
            f"{kind}: {total:g} (free: {free.get(kind, 0):g})"
            for kind, total in (
                ("CPU", sum(node.num_cpus for node in self.nodes)),
                ("GPU", sum(node.num_gpus for node in self.nodes)),
            )
        ]
        return (
            f"it asked for {', '.join(asked)}; the cluster's {len(self.nodes)} nodes have "
            f"{', '.join(has)}"
        )

    def probe_gpu(self) -> GpuInfo | None:
        """Return what a worker with a GPU would find; None if that takes too long."""
        ray = self.open()
        ref = ray.remote(num_cpus=0, num_gpus=1, max_retries=0)(visible_gpus).remote()
        ready, _ = ray.wait([ref], timeout=PROBE_S)
        if not ready:
            ray.cancel(ref, force=True)
            return None
        try:
            gpus: list[GpuInfo] = ray.get(ref, timeout=PROBE_S)
        except ray.exceptions.RayError:
            return None
        return next(iter(gpus), None)

    @property
    def _watched(self) -> "_Watch":
        return self._watch or _Watch()


def end_process(pid: int) -> None:
    """Kill a Ray worker of this machine, if the process still is one."""
    try:
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
            os.kill(pid, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        return


class _Watch:
    """The nodes as they were a moment ago, seen from a thread: a dead head answers nobody."""

    def __init__(self) -> None:
        self.nodes: dict[str, NodeInfo] = {}
        self._answered_at = self._asked_at = time.monotonic()

    def look(self, ray: Any) -> None:
        """Ask the head."""
        draining = _draining(ray)
        self.nodes = {
            node["NodeID"]: NodeInfo(
                node_id=node["NodeID"],
                address=node["NodeManagerAddress"],
                port=node["NodeManagerPort"],
                num_cpus=node["Resources"].get("CPU", 0),
                num_gpus=int(node["Resources"].get("GPU", 0)),
                object_store_bytes=int(node["Resources"].get("object_store_memory", 0)),
                is_draining=node["NodeID"] in draining,
            )
            for node in ray.nodes()
            if node["Alive"]
        }
        self._answered_at = time.monotonic()

    def silent_s(self) -> float:
        """Return how long the head has not answered; time in which nobody asked is left out."""
        now = time.monotonic()
        if now - self._asked_at > MAX_GAP_S:
            self._answered_at = now
        self._asked_at = now
        return now - self._answered_at


@contextmanager
def _watch(ray: Any) -> Iterator[_Watch]:
    """Look at the nodes every second, until the end."""
    watch, is_over = _Watch(), threading.Event()

    def look_again() -> None:
        while not is_over.wait(WATCH_S):
            # What keeps the head from answering counts as silence.
            with suppress(ray.exceptions.RayError, RuntimeError, OSError):
                watch.look(ray)

    watch.look(ray)
    thread = threading.Thread(target=look_again, name="watch", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        is_over.set()
        thread.join(2 * WATCH_S)


def _draining(ray: Any) -> set[str]:
    """Return the nodes that are to be gone soon; Ray has no public way to ask."""
    state = ray._private.state.state
    ask = getattr(state, "get_draining_nodes", None)
    return set(ask()) if ask is not None else set()


# -- a private Ray ---------------------------------------------------------------------------------


def worker_environ(placement: StagePlacement) -> dict[str, str]:
    """Return the environment variables of a worker: its share of the cores, and no GPUs if it was
    promised none."""
    environ = {"OMP_NUM_THREADS": str(placement.num_threads), "TOKENIZERS_PARALLELISM": "false"}
    environ |= _thread_waits()
    return environ if placement.num_gpus else environ | {"CUDA_VISIBLE_DEVICES": ""}


def _thread_waits() -> dict[str, str]:
    """Return how a worker's threads wait; nothing where the user has said it."""
    if os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        return {}
    return {"GOMP_SPINCOUNT": SPIN_COUNT}


def private_session(
    layout: ClusterLayout, object_store_bytes: int = OBJECT_STORE_BYTES
) -> RaySession:
    """Return a Ray of this machine's own, with room for the layout's workers."""
    stages = layout.by_role.values()
    num_cpus = math.ceil(sum(stage.num_workers * stage.num_cpus for stage in stages))
    num_gpus = sum(stage.num_workers * stage.num_gpus for stage in stages)
    variables = _thread_waits() | (ZERO_COPY if layout.is_split else {})
    return RaySession(
        lambda: _private_ray(max(1, num_cpus), num_gpus, object_store_bytes, variables),
        is_private=True,
    )


@contextmanager
def _private_ray(
    num_cpus: int, num_gpus: int, object_store_bytes: int, variables: Mapping[str, str]
) -> Iterator[Any]:
    """Start a Ray of our own with some environment variables, yield the module, and end it.

    Other clusters on the machine are left alone.
    """
    check_shm(object_store_bytes)
    with (
        session_dir() as folder,
        environ(
            # Read when ray is imported: the odd name makes 127.0.0.1 this node's address.
            RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN_PATH=str(write_token(folder)),
            RAY_AUTH_TOKEN=None,
            RAY_USAGE_STATS_ENABLED="0",
            # Ray's coming default, which it warns about: GPUs are hidden from workers of none.
            RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="1",
            **variables,
        ),
    ):
        ray = _import_ray(is_loopback=True)
        try:
            with _few_services():
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    num_gpus=num_gpus,
                    object_store_memory=object_store_bytes,
                    include_dashboard=False,
                    log_to_driver=False,
                    configure_logging=False,
                    _temp_dir=f"{folder}/ray",
                )
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise EngineError(f"Ray {ray.__version__} did not start: {error}") from error
        try:
            yield ray
        finally:
            ray.shutdown()


@contextmanager
def _few_services() -> Iterator[None]:
    """Start a Ray without its autoscaler and the process that forwards workers' output, and with a
    free port for its agent: on the usual one a second Ray of the machine waits for the first.

    `ray.init` has no options for that.
    """
    from ray._private import parameter

    params = parameter.RayParams
    parameter.RayParams = partial(
        params, no_monitor=True, include_log_monitor=False, dashboard_agent_listen_port=0
    )
    try:
        yield
    finally:
        parameter.RayParams = params


def _import_ray(*, is_loopback: bool) -> Any:
    """Import Ray, and let it read the environment again if this process had done so before."""
    import ray
    from ray._private import ray_constants
    from ray._private import worker as ray_worker
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    if ray.is_initialized():
        raise EngineError(
            "this process is connected to a Ray cluster already, and raydiff makes a connection "
            "of its own. Call ray.shutdown() first, or render in another process."
        )
    ray_constants.ENABLE_RAY_CLUSTER = not is_loopback
    # The driver hands references on, never a tensor, and so it needs no torch.
    ray_constants.RAY_ENABLE_ZERO_COPY_TORCH_TENSORS = False
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    # Ray prints a worker's death on stdout, which belongs to the command's own answer.
    ray_worker._worker_logs_enabled = False
    return ray


# -- a cluster to join -----------------------------------------------------------------------------


def joined_session(address: str, *, insecure: bool = False) -> RaySession:
    """Return the cluster at `host:port`, or the one that this machine is a node of (`auto`).

    Opening it raises ConfigError for a cluster that cannot be joined or, unless `insecure`, asks
    for no token: anyone who reaches it could run code in the workers.
    """
    return RaySession(lambda: _joined_ray(address, insecure), is_private=False)


@contextmanager
def _joined_ray(address: str, insecure: bool) -> Iterator[Any]:
    has_token = check_token(insecure)
    # Until the cluster is known to ask for a token, it is shown a wrong one: this one is secret.
    with environ(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN="0" * 64,
        RAY_USAGE_STATS_ENABLED="0",
    ):
        ray = _import_ray(is_loopback=False)
        head = _head(address)
        is_protected = _asks_for_token(ray, head)
    if not is_protected and not insecure:
        raise ConfigError(
            f"engine.address: {address}: this Ray cluster asks for no token, so that anyone who "
            "reaches it can run code on its nodes. Start it with RAY_AUTH_MODE=token, or accept "
            "that with --insecure."
        )
    mode = "token" if is_protected and has_token else "disabled"
    with environ(RAY_AUTH_MODE=mode, RAY_USAGE_STATS_ENABLED="0"):
        ray = _import_ray(is_loopback=False)
        try:
            is_loopback = any(node.startswith("127.") for node in _node_addresses(head))
            ray = _import_ray(is_loopback=is_loopback)
            ray.init(address=head, log_to_driver=False, configure_logging=False)
        except ray.exceptions.AuthenticationError:
            raise ConfigError(
                f"engine.address: {address}: the cluster does not take this token. Give the one "
                "it was started with, in ~/.ray/auth_token or in the file RAY_AUTH_TOKEN_PATH."
            ) from None
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ConfigError(
                f"engine.address: {address}: the cluster cannot be joined: {error} Run raydiff on "
                "one of its nodes, by `ray job submit` for example."
            ) from None
        try:
            yield ray
        finally:
            ray.shutdown()


def _head(address: str) -> str:
    """Return `host:port` of a cluster whose head answers there."""
    from ray._private import services

    if "://" in address:
        raise ConfigError(
            f"engine.address: {address}: Ray's client mode is not supported. Run raydiff on a node "
            "of the cluster (`ray job submit`), with --address auto."
        )
    head: str | None = address
    try:
        if address == "auto":
            head = services.get_ray_address_from_environment("auto", None)
    except ConnectionError as error:
        raise ConfigError(
            f"engine.address: {address}: no cluster is found from here: {error}. Run raydiff on "
            "one of its nodes, or give host:port of its head."
        ) from None
    host, _, port = str(head).rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"engine.address: {address}: expected host:port, e.g. 10.0.0.1:6379")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"engine.address: {address}: no Ray head answers there: {error}. Check host and port "
            "(6379 unless the head was started with another)."
        ) from None
    return str(head)


def _asks_for_token(ray: Any, head: str) -> bool:
    """Return whether a cluster refuses a wrong token. Raises ConfigError for what is no cluster."""
    try:
        with _native_stderr_off():
            _gcs(head).internal_kv_get(b"raydiff", namespace=b"raydiff", timeout=CONNECT_S)
    except ray.exceptions.AuthenticationError:
        return True
    except ray.exceptions.RayError as error:
        raise ConfigError(f"engine.address: {head}: no Ray head answers there: {error}") from None
    return False


@contextmanager
def _native_stderr_off() -> Iterator[None]:
    """Keep Ray's C++ from warning of the wrong token that it is given on purpose."""
    saved = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def _node_addresses(head: str) -> list[str]:
    """Return the addresses of a cluster's nodes. A head that has just started has none yet."""
    gcs = _gcs(head)
    until = time.monotonic() + CONNECT_S
    while not (nodes := gcs.get_all_node_info(timeout=CONNECT_S)):
        if time.monotonic() > until:
            raise ConfigError(
                f"engine.address: {head}: the cluster has no nodes. Look into the log of its head."
            )
        time.sleep(0.2)
    return [str(node.node_manager_address) for node in nodes.values()]


def _gcs(head: str) -> Any:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    return GcsClient(address=head)


# -- several nodes on one machine ------------------------------------------------------------------


def node_starter() -> Any:
    """Return Ray's class that starts nodes on this machine, for measurements and tests."""
    _import_ray(is_loopback=True)
    from ray.cluster_utils import Cluster

    return Cluster


def drain_node(head: str, node_id: str, *, deadline_s: float) -> None:
    """Announce that a node will be gone, as a cloud does before it takes one back."""
    deadline_ms = int((time.time() + deadline_s) * 1000)
    preemption = 2
    _gcs(head).drain_node(node_id, preemption, "it is taken back", deadline_ms)
