"""Which GPUs a process sees: CUDA_VISIBLE_DEVICES as CUDA reads it."""

import pytest

from raydiff.memory.gpus import gpu_usage, visible_gpus, visible_indices

UUIDS = ["GPU-aaaa-1", "GPU-bbbb-2", "GPU-bcbc-3"]


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("1", [1]),
        ("2,0", [2, 0]),
        (" 1 , 2 ", [1, 2]),
        ("0,-1,2", [0]),  # cut at the first entry that names no GPU
        ("0,7,2", [0]),
        ("GPU-bbbb-2", [1]),
        ("GPU-bc,GPU-a", [2, 0]),  # a prefix is enough where it is unique
        ("GPU-b", []),
        ("0,0,1", [0]),
        ("nonsense", []),
    ],
)
def test_cuda_visible_devices(variable: str | None, expected: list[int]) -> None:
    assert visible_indices(variable, UUIDS) == expected


@pytest.mark.gpu
def test_nvml_and_torch_see_the_same_gpus() -> None:
    import torch

    gpus = visible_gpus()
    assert len(gpus) == torch.cuda.device_count() > 0
    for gpu in gpus:
        free, total = torch.cuda.mem_get_info(gpu.cuda_index)
        assert gpu.name == torch.cuda.get_device_name(gpu.cuda_index)
        assert abs(gpu.total_bytes - total) < 0.03 * total
        assert abs(gpu.free_bytes - free) < 0.05 * total


def test_no_gpu_has_no_usage() -> None:
    assert gpu_usage(0, {"CUDA_VISIBLE_DEVICES": ""}) is None
    assert gpu_usage(1000) is None


@pytest.mark.gpu
def test_a_gpu_that_works_is_busy_and_one_that_holds_memory_says_so() -> None:
    import time

    import torch

    idle = gpu_usage()
    assert idle is not None
    matrix = torch.randn(8192, 8192, device="cuda")
    until = time.monotonic() + 6
    while time.monotonic() < until:
        for _ in range(20):
            matrix = matrix @ matrix / 8192
        torch.cuda.synchronize()
    began = time.monotonic()
    busy = gpu_usage()
    elapsed_s = time.monotonic() - began
    assert busy is not None
    assert busy.utilization is not None
    assert 0.2 < busy.utilization <= 1
    assert busy.used_bytes >= idle.used_bytes + 8192 * 8192 * 4
    assert elapsed_s < 0.5
