"""Which workers a run has and what each takes: from the settings and the machines there are."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raydiff.config import EngineConfig, RunConfig
from raydiff.engine.cluster_file import ClusterLayout, StagePlacement, load_cluster_file
from raydiff.engine.messages import Place, Role
from raydiff.errors import ConfigError
from raydiff.memory.gpus import GpuInfo

MAX_ENCODER_CPUS = 8
"""More threads gain an encoder little: it takes one text at a time on a CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeInfo:
    """A machine of a cluster, and what it has in all."""

    node_id: str
    address: str
    port: int
    """Where its raylet listens."""
    num_cpus: float
    num_gpus: int
    object_store_bytes: int
    is_draining: bool = False


def places(layout: ClusterLayout) -> list[Place]:
    """Return a place for each worker: `w0`, or `encode-0` where the stages are split."""
    return [
        Place(
            worker_id=f"{role}-{index}" if layout.is_split else f"w{index}",
            role=role,
            is_elastic=placement.is_elastic,
        )
        for role, placement in layout.by_role.items()
        for index in range(placement.num_workers)
    ]


def fused_layout(num_workers: int, *, num_gpus: int = 0) -> ClusterLayout:
    """Return so many workers that do all stages, on a GPU each where there are any.

    A machine's cores are shared out among them.
    """
    return _on_one_machine({"fused": _stage(num_workers, num_gpus=min(1, num_gpus))})


# -- this machine ----------------------------------------------------------------------------------


def local_layout(config: RunConfig, gpus: Sequence[GpuInfo]) -> ClusterLayout:
    """Return the workers of a run on this machine: one per GPU, or on the CPU without one.

    Raises ConfigError for more workers than GPUs.
    """
    engine = config.engine
    if engine.cluster is not None:
        return _cluster_file_here(engine, len(gpus))
    num_gpus = len(gpus) if uses_gpus(config) else 0
    num_workers = max(1, num_gpus) if engine.workers == "auto" else engine.workers
    if num_gpus and num_workers > num_gpus:
        raise ConfigError(
            f"engine.workers: {num_workers}: a worker takes a whole GPU, and there are {num_gpus}. "
            f"Use --workers {num_gpus}, or --profile cpu_only for workers on the CPU."
        )
    workers = _stage(num_workers, num_gpus=min(1, num_gpus))
    if engine.stages == "split":
        return _on_one_machine({"encode": _stage(1), "denoise_decode": workers})
    return _on_one_machine({"fused": workers})


def uses_gpus(config: RunConfig) -> bool:
    """Return whether workers take GPUs where there are some."""
    memory = config.memory
    return memory.profile != "cpu_only" or "cuda" in memory.devices.values()


def _cluster_file_here(engine: EngineConfig, num_gpus: int) -> ClusterLayout:
    """Take a cluster file for this machine: its labels and own resources have no meaning here."""
    layout = _checked(engine, load_cluster_file(engine.cluster or ""))
    stages: dict[Role, StagePlacement] = {}
    num_free = num_gpus
    for role, placement in layout.by_role.items():
        takes_gpus = placement.num_gpus > 0
        room = num_free if takes_gpus else 1
        number = placement.count or min(placement.num_workers, room)
        if takes_gpus and not 0 < number <= num_free:
            raise ConfigError(
                f"engine.cluster: {engine.cluster}: stage {role} takes {max(number, 1)} GPU, and "
                f"of {num_gpus} here {num_free} are free. Join a cluster with --address, or use "
                "another cluster file."
            )
        num_free -= number if takes_gpus else 0
        stages[role] = _stage(number, num_gpus=placement.num_gpus, threads=placement.threads)
    return _on_one_machine(stages)


def _on_one_machine(stages: dict[Role, StagePlacement]) -> ClusterLayout:
    """Share this machine's cores out, where a stage does not say how many it takes.

    Each stage shares all of them among its own workers, as a fused run does: the number of threads
    decides the last bits of an image, and split and fused runs are to write the same.
    """
    num_workers = max(placement.num_workers for placement in stages.values())
    threads = max(1, len(os.sched_getaffinity(0)) // num_workers)
    return _layout(
        {
            role: placement.model_copy(update={"threads": placement.threads or threads})
            for role, placement in stages.items()
        }
    )


# -- a cluster -------------------------------------------------------------------------------------


def cluster_layout(
    config: RunConfig, nodes: Sequence[NodeInfo], *, encodes_on_cpu: Callable[[], bool]
) -> ClusterLayout:
    """Return the workers of a run on a cluster's nodes as they are now.

    They are elastic: one of each role is enough, and one that has no node waits for it.
    `encodes_on_cpu` says whether the GPUs' memory profile puts text encoders on the CPU.
    """
    engine = config.engine
    if engine.cluster is not None:
        return _checked(engine, load_cluster_file(engine.cluster))
    gpu_nodes = [node for node in nodes if node.num_gpus and uses_gpus(config)]
    cpu_nodes = [node for node in nodes if not node.num_gpus and node.num_cpus >= 1]
    num_gpus = sum(node.num_gpus for node in gpu_nodes)
    workers = _elastic(
        max(1, num_gpus) if engine.workers == "auto" else engine.workers,
        num_cpus=min((_cpus_per_gpu(node) for node in gpu_nodes), default=1),
        num_gpus=min(1, num_gpus),
    )
    is_split = engine.stages == "split" or (
        engine.stages == "auto" and bool(gpu_nodes and cpu_nodes) and encodes_on_cpu()
    )
    if not is_split:
        return _layout({"fused": workers})
    smallest = min((int(node.num_cpus) for node in cpu_nodes), default=1)
    encoders = _elastic(max(1, len(cpu_nodes)), num_cpus=min(smallest, MAX_ENCODER_CPUS))
    return _layout({"encode": encoders, "denoise_decode": workers})


def grown(layout: ClusterLayout, newer: ClusterLayout) -> ClusterLayout:
    """Return `layout` with the workers that `newer` has more of the same roles.

    A node that is gone takes no place away: its worker's place waits for another node.
    """
    stages = {
        role: max(placement, newer.by_role.get(role, placement), key=lambda one: one.num_workers)
        for role, placement in layout.by_role.items()
    }
    return _layout(stages)


def _cpus_per_gpu(node: NodeInfo) -> int:
    return max(1, int(node.num_cpus) // node.num_gpus) if node.num_cpus >= 1 else 0


# -- layouts ---------------------------------------------------------------------------------------


def _checked(engine: EngineConfig, layout: ClusterLayout) -> ClusterLayout:
    """Refuse settings that contradict the cluster file."""
    file = f"the cluster file {engine.cluster}"
    if engine.workers != "auto":
        raise ConfigError(
            f"engine.workers: {engine.workers}: {file} says how many there are. Leave one out."
        )
    if engine.stages != "auto" and layout.is_split != (engine.stages == "split"):
        roles = " + ".join(layout.by_role)
        raise ConfigError(f"engine.stages: {engine.stages}: {file} has {roles}. Leave one out.")
    return layout


def _stage(number: int, *, num_gpus: int = 0, threads: int | None = None) -> StagePlacement:
    return StagePlacement(
        count=number, resources={"CPU": 1.0, "GPU": float(num_gpus)}, threads=threads
    )


def _elastic(number: int, *, num_cpus: int, num_gpus: int = 0) -> StagePlacement:
    resources = {"CPU": float(num_cpus), "GPU": float(num_gpus)}
    return StagePlacement(max=number, resources=resources)


def _layout(stages: dict[Role, StagePlacement]) -> ClusterLayout:
    return ClusterLayout.model_validate({"stages": stages})
