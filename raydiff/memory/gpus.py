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
