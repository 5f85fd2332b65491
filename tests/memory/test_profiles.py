"""Profiles: the five policies, and which one `auto` gives to which card."""

from collections.abc import Collection

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
    model_profile,
    poorer_profile,
    resolve_profile,
)
from raydiff.request import ModelInfo

SDXL_BF16 = {
    "unet": 5_134_927_368,
    "vae": 167_307_726,
    "text_encoder": 246_120_960,
    "text_encoder_2": 1_389_319_680,
}

LTX2_PARAMETERS = {
    "text_encoder": 11_766_034_176,
    "connectors": 1_431_475_200,
    "transformer": 18_876_174_592,
    "vae": 1_222_479_857,
    "latent_upsampler": 497_867_904,
    "audio_vae": 53_248_402,
    "vocoder": 55_592_802,
}
"""Of LTX-2.0."""


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


def ltx2_profile(
    total_mib: int, components: Collection[str] = LTX2_PARAMETERS.keys(), num_fp8: int = 0
) -> str:
    """Return the profile that a GPU gives those components of an LTX-2."""
    info = ModelInfo(
        name="ltx2",
        family="ltx2",
        path="",
        revision="1",
        tasks=("txt2vid",),
        default_height=512,
        default_width=768,
        size_multiple=32,
        default_num_inference_steps=40,
        default_guidance_scale=3.0,
        default_strength=1.0,
        default_sampler="euler",
        num_parameters=LTX2_PARAMETERS,
        num_fp8_parameters={"transformer": num_fp8},
    )
    return model_profile(MemoryConfig(), info, "bfloat16", components, gpu(total_mib)).name


@pytest.mark.parametrize(
    ("total_mib", "expected"),
    [
        (143_771, "full_gpu"),  # H200
        (97_887, "full_gpu"),  # 96 GB as sold
        (81_559, "balanced"),  # H100: the weights would fit it, and not the rest
        (46_068, "balanced"),  # L40S
        (40_960, "gpu_poor"),
        (32_607, "extreme"),
        (12_288, "extreme"),
    ],
)
def test_auto_knows_what_ltx2_takes(total_mib: int, expected: str) -> None:
    assert ltx2_profile(total_mib) == expected


def test_a_smaller_card_does_for_fewer_components_and_for_fp8() -> None:
    assert ltx2_profile(24_564, num_fp8=16_000_000_000) == "gpu_poor"
    assert ltx2_profile(32_607, ["vae", "audio_vae", "vocoder"]) == "full_gpu"
    assert ltx2_profile(40_960, ["text_encoder", "connectors"]) == "balanced"
    assert ltx2_profile(48_685, ["transformer", "connectors", "vae"]) == "balanced"


def test_every_profile_counts_all_of_ltx2() -> None:
    whole = {name: 2 * count for name, count in LTX2_PARAMETERS.items()}
    text = whole["text_encoder"] + whole["connectors"]
    assert {name: load_profile(name).gpu_bytes(whole) for name in PROFILES} == {
        "full_gpu": sum(whole.values()),
        "balanced": whole["transformer"],
        "gpu_poor": whole["transformer"],
        "extreme": whole["vae"],
        "cpu_only": 0,
    }
    small = {**whole, "transformer": 1, "refine_transformer": 2, "vae": 3, "latent_upsampler": 4}
    assert load_profile("balanced").gpu_bytes(small) == text
    assert load_profile("gpu_poor").gpu_bytes(small) == whole["audio_vae"] + whole["vocoder"]


def test_batches_of_clips_have_up_to_16384_tokens_at_full_gpu() -> None:
    full, poor = load_profile("full_gpu"), load_profile("gpu_poor")
    assert [full.max_batch_size(512, 768, frames) for frames in (121, 241, 9)] == [2, 1, 37]
    assert poor.max_batch_size(512, 768, 121) == 1


def test_batches_hold_one_image_at_least() -> None:
    profile = load_profile("full_gpu")
    assert profile.max_batch_size(1024, 1024) == 8
    assert profile.max_batch_size(512, 512) == 32
    assert profile.max_batch_size(8192, 8192) == 1
