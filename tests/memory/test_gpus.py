"""Which GPUs a process sees: CUDA_VISIBLE_DEVICES as CUDA reads it."""

import pytest

from raydiff.memory.gpus import visible_gpus, visible_indices

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
