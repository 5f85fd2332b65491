"""Profiles: the five policies, and which one `auto` gives to which card."""

import pytest

from raydiff.config import MemoryConfig
from raydiff.config_files import config_names
from raydiff.errors import ConfigError
from raydiff.memory.gpus import GpuInfo
from raydiff.memory.profiles import (
    GIB,
    PROFILES,
    compute_dtype,
    load_profile,
    poorer_profile,
    resolve_profile,
)

SDXL_BF16 = {
    "unet": 5_134_927_368,
    "vae": 167_307_726,
    "text_encoder": 246_120_960,
    "text_encoder_2": 1_389_319_680,
}


def gpu(total_mib: int, free_gib: float | None = None) -> GpuInfo:
    total = total_mib * 1024**2
    return GpuInfo(
        cuda_index=0,
        uuid="GPU-0",
        name="a card",
        total_bytes=total,
        free_bytes=total if free_gib is None else int(free_gib * GIB),
        driver="580",
    )


def test_every_profile_is_a_file_and_every_file_a_profile() -> None:
    assert sorted(PROFILES) == config_names("profiles")
    for name in PROFILES:
        assert load_profile(name).name == name


@pytest.mark.parametrize(
    ("total_mib", "expected"),
    [
        (143_771, "full_gpu"),  # H200
        (16_376, "full_gpu"),  # 16 GB as sold
        (15_360, "full_gpu"),  # T4: 16 GB with ECC
        (12_288, "balanced"),
        (10_240, "balanced"),
        (8_192, "gpu_poor"),
        (6_144, "gpu_poor"),
        (4_096, "extreme"),
        (2_048, "extreme"),
    ],
)
def test_auto_goes_by_the_card_as_sold(total_mib: int, expected: str) -> None:
    profile = resolve_profile(MemoryConfig(), "sdxl", SDXL_BF16, gpu(total_mib))
    assert profile.name == expected


def test_auto_dtype_goes_by_where_the_weights_are() -> None:
    on_cpu = MemoryConfig(profile="cpu_only")
    assert compute_dtype("auto", MemoryConfig(), gpu(16_376)) == "bfloat16"
    assert compute_dtype("auto", on_cpu, gpu(16_376)) == "float32"
    assert compute_dtype("auto", MemoryConfig(), None) == "float32"
    assert compute_dtype("float16", on_cpu, None) == "float16"


def test_poorer_profiles_end_before_the_cpu() -> None:
    steps = [poorer_profile(name) for name in PROFILES]
    assert steps == ["balanced", "gpu_poor", "extreme", None, None]


def test_auto_without_a_gpu_is_cpu_only() -> None:
    assert resolve_profile(MemoryConfig(), "sdxl", SDXL_BF16, None).name == "cpu_only"


@pytest.mark.parametrize(
    ("free_gib", "expected"),
    [(20, "full_gpu"), (6, "balanced"), (4, "extreme"), (0.2, "extreme"), (0.1, "cpu_only")],
)
def test_auto_steps_down_to_what_free_memory_holds(free_gib: float, expected: str) -> None:
    profile = resolve_profile(MemoryConfig(), "sdxl", SDXL_BF16, gpu(24_576, free_gib))
    assert profile.name == expected


def test_a_named_profile_is_taken_as_it_is() -> None:
    config = MemoryConfig(profile="gpu_poor")
    assert resolve_profile(config, "sdxl", SDXL_BF16, gpu(143_771)).name == "gpu_poor"


def test_a_device_per_component_overrides_the_profile() -> None:
    config = MemoryConfig(profile="full_gpu", devices={"vae": "cpu"})
    profile = resolve_profile(config, "sdxl", SDXL_BF16, gpu(24_576))
    assert profile.devices == {"text_encoder": "cuda", "unet": "cuda", "vae": "cpu"}


@pytest.mark.parametrize(
    "config",
    [MemoryConfig(profile="full_gpu"), MemoryConfig(devices={"vae": "cuda"})],
)
def test_a_profile_that_needs_a_gpu_says_so_where_there_is_none(config: MemoryConfig) -> None:
    with pytest.raises(ConfigError, match="no GPU is visible"):
        resolve_profile(config, "sdxl", SDXL_BF16, None)


def test_gpu_bytes_count_text_encoders_together_and_phases_apart() -> None:
    text = SDXL_BF16["text_encoder"] + SDXL_BF16["text_encoder_2"]
    vae = SDXL_BF16["vae"]
    assert load_profile("full_gpu").gpu_bytes(SDXL_BF16) == sum(SDXL_BF16.values())
    assert load_profile("balanced").gpu_bytes(SDXL_BF16) == SDXL_BF16["unet"]
    assert load_profile("balanced").gpu_bytes({**SDXL_BF16, "unet": 1}) == text
    assert load_profile("gpu_poor").gpu_bytes({**SDXL_BF16, "unet": 1}) == vae
    assert load_profile("extreme").gpu_bytes(SDXL_BF16) == vae
    assert load_profile("cpu_only").gpu_bytes(SDXL_BF16) == 0


def test_batches_hold_one_image_at_least() -> None:
    profile = load_profile("full_gpu")
    assert profile.max_batch_size(1024, 1024) == 8
    assert profile.max_batch_size(512, 512) == 32
    assert profile.max_batch_size(8192, 8192) == 1
