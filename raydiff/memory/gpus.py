"""The GPUs that this process may use, read through NVML: no torch, no CUDA context."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import pynvml


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuInfo:
    """One visible GPU; its bytes are the driver's count, now, with every process in it."""

    cuda_index: int
    """Position among the visible GPUs: `cuda:<cuda_index>` in this process."""
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    driver: str


def visible_gpus(environ: Mapping[str, str] = os.environ) -> list[GpuInfo]:
    """Return the GPUs that CUDA would show this process, in CUDA's order.

    CUDA_VISIBLE_DEVICES is read as CUDA reads it: indices in PCI order or UUID prefixes (`GPU-`),
    cut at the first entry that names no GPU; unset shows all, empty or -1 none.
    Without a driver the list is empty.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        uuids = [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        shown = visible_indices(environ.get("CUDA_VISIBLE_DEVICES"), uuids)
        return [
            _describe(handles[index], uuids[index], cuda_index, driver)
            for cuda_index, index in enumerate(shown)
        ]
    finally:
        pynvml.nvmlShutdown()


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuUsage:
    """How busy a GPU is, with every process on it."""

    utilization: float | None
    """0..1: share of the last seconds in which a kernel ran; None where NVML does not count it."""
    used_bytes: int


def gpu_usage(cuda_index: int = 0, environ: Mapping[str, str] = os.environ) -> GpuUsage | None:
    """Return how busy `cuda:<cuda_index>` of this process is; None without a driver or such a GPU.

    Cheap enough for every few seconds, from any thread, while the GPU works.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        uuids = [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
        shown = visible_indices(environ.get("CUDA_VISIBLE_DEVICES"), uuids)
        if cuda_index >= len(shown):
            return None
        handle = handles[shown[cuda_index]]
        return GpuUsage(
            utilization=_utilization(handle),
            used_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).used),
        )
    except pynvml.NVMLError:
        return None  # it fell off the bus, say: not the business of who only looks
    finally:
        pynvml.nvmlShutdown()


def visible_indices(variable: str | None, uuids: list[str]) -> list[int]:
    """Return the indices into `uuids` that a value of CUDA_VISIBLE_DEVICES shows, in its order."""
    if variable is None:
        return list(range(len(uuids)))
    shown: list[int] = []
    for entry in variable.split(","):
        index = _index_of(entry.strip(), uuids)
        if index is None or index in shown:
            break
        shown.append(index)
    return shown


def _index_of(entry: str, uuids: list[str]) -> int | None:
    if entry.isdigit():
        return int(entry) if int(entry) < len(uuids) else None
    matches = [i for i, uuid in enumerate(uuids) if entry and uuid.startswith(entry)]
    return matches[0] if len(matches) == 1 else None


def _describe(handle: object, uuid: str, cuda_index: int, driver: str) -> GpuInfo:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return GpuInfo(
        cuda_index=cuda_index,
        uuid=uuid,
        name=str(pynvml.nvmlDeviceGetName(handle)),
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        driver=driver,
    )


def _utilization(handle: object) -> float | None:
    """Average what the driver has sampled lately: one sample is a sixth of a second."""
    try:
        _, samples = pynvml.nvmlDeviceGetSamples(handle, pynvml.NVML_GPU_UTILIZATION_SAMPLES, 0)
        percents = [int(sample.sampleValue.uiVal) for sample in samples]
    except pynvml.NVMLError:
        percents = []
    try:
        # The buffer is empty just after the driver has started.
        percents = percents or [int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)]
    except pynvml.NVMLError:
        return None
    return sum(percents) / len(percents) / 100
