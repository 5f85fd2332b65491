"""Memory profiles: named policies for where components run and what is freed when.

The five profiles are data (configs/profiles/*.yaml); `resolve_profile` picks one for a model on
a GPU and lays the run's own choices over it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import yaml

from raydiff.config import DTypeName, MemoryConfig, ProfileName
from raydiff.config_files import config_file
from raydiff.errors import ConfigError
from raydiff.memory.gpus import GpuInfo
from raydiff.request import ModelInfo

Cleanup = Literal["none", "phase", "step"]
Guidance = Literal["batched", "sequential"]
ComputeDType = Literal["float32", "bfloat16", "float16"]

PROFILES: tuple[ProfileName, ...] = ("full_gpu", "balanced", "gpu_poor", "extreme", "cpu_only")
"""From the most VRAM to the least."""

DTYPE_BYTES: dict[ComputeDType, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
GIB = 1024**3
FRAMES_PER_IMAGE = 16
"""Frames of a clip that take the room of one image in a batch. So an H200's batches have up to
16,384 of LTX-2's tokens: with more it is no faster, and others run out of memory sooner."""
CARD_TOLERANCE = 0.9
"""A card sold as N GB may report a tenth less than N GiB (ECC, reserved memory: T4, A10)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """One policy. Components are text_encoder (all that encodes texts), unet (or transformers) and
    vae (all that decodes)."""

    name: ProfileName
    min_card_gib: dict[str, float]
    """Per family: the smallest card, in GiB as sold, that `auto` gives this profile, for all of a
    checkpoint in two bytes a weight."""
    devices: dict[str, str]
    """Where each component computes: `cuda` or `cpu`."""
    guidance: Guidance
    """batched: both halves of guidance in one forward pass; sequential: one after the other."""
    cleanup: Cleanup
    """none: components stay on the GPU. phase: each is there for its own phase only, and freed
    memory goes back to the driver between phases. step: as phase, and the weights of the UNet or
    transformer visit layer by layer."""
    max_batch_pixels: int
    """Largest batch x height x width."""
    vae_batch_pixels: int
    """Most pixels decoded at once, whole images at least."""
    vae_tile_pixels: int | None
    """Images of more pixels are decoded in tiles; None is never."""

    def max_batch_size(self, height: int, width: int, num_frames: int | None = None) -> int:
        """Return how many images, or clips of so many frames, may share a batch, one at least."""
        pixels = height * width
        if num_frames is not None:
            pixels = max(1, pixels * num_frames // FRAMES_PER_IMAGE)
        return max(1, self.max_batch_pixels // pixels)

    def gpu_bytes(self, component_bytes: Mapping[str, int]) -> int:
        """Return the weight bytes that this profile holds on the GPU at its widest moment."""
        phases: dict[str, int] = {}
        for component, size in component_bytes.items():
            kind = component_kind(component)
            if self.devices[kind] != "cuda" or (self.cleanup == "step" and kind == "unet"):
                continue
            phase = _TOGETHER.get(component, kind if kind == "text_encoder" else component)
            phases[phase] = phases.get(phase, 0) + size
        return sum(phases.values()) if self.cleanup == "none" else max(phases.values(), default=0)


_TOGETHER = {"audio_vae": "sound", "vocoder": "sound"}
"""Components that come to the GPU for one phase, as all that encodes texts does."""

_KINDS = {
    "transformer": "unet",
    "refine_transformer": "unet",
    "connectors": "text_encoder",
    "latent_upsampler": "vae",
    "audio_vae": "vae",
    "vocoder": "vae",
}


def component_kind(component: str) -> str:
    """Return the kind that profiles speak of: `text_encoder_2` is a `text_encoder`."""
    if component.startswith("text_encoder"):
        return "text_encoder"
    return _KINDS.get(component, component)


def load_profile(name: ProfileName) -> Profile:
    """Read one of the five profiles from its YAML file."""
    values: dict[str, Any] = yaml.safe_load(config_file("profiles", name).read_text("utf-8"))
    values.pop("description")
    return Profile(name=name, **values)


def compute_dtype(name: DTypeName, memory: MemoryConfig, gpu: GpuInfo | None) -> ComputeDType:
    """Return what weights are loaded in: `auto` is float32 on the CPU and bfloat16 on a GPU."""
    if name != "auto":
        return name
    is_on_gpu = gpu is not None and memory.profile != "cpu_only"
    return "bfloat16" if is_on_gpu else "float32"


def poorer_profile(name: ProfileName) -> ProfileName | None:
    """Return the next profile on the way to the least VRAM; None for the last that uses a GPU."""
    poorer = PROFILES[PROFILES.index(name) + 1 :]
    return poorer[0] if poorer and poorer[0] != "cpu_only" else None


def resolve_profile(
    memory: MemoryConfig,
    family: str,
    component_bytes: Mapping[str, int],
    gpu: GpuInfo | None,
    *,
    whole_bytes: Mapping[str, int] | None = None,
) -> Profile:
    """Return the profile to run `family` with on `gpu` (None: no GPU).

    `auto` goes by the card's size as sold, then steps down while what is free now does not hold
    the profile's weights. Where less is loaded than `whole_bytes`, all of the checkpoint in two
    bytes a weight, a smaller card does. A profile asked for by name is taken as it is.
    """
    if memory.profile == "auto":
        profile = _auto(family, component_bytes, whole_bytes or component_bytes, gpu)
    else:
        profile = load_profile(memory.profile)
    if memory.devices:
        profile = replace(
            profile, devices=profile.devices | {str(k): v for k, v in memory.devices.items()}
        )
    if gpu is None and "cuda" in {device.split(":")[0] for device in profile.devices.values()}:
        raise ConfigError(
            f"memory.profile is {profile.name} with {profile.devices}, but no GPU is visible. "
            "Use --profile cpu_only or auto, or check `raydiff doctor`."
        )
    return profile


def model_profile(
    memory: MemoryConfig,
    info: ModelInfo,
    dtype: ComputeDType,
    components: Collection[str],
    gpu: GpuInfo | None,
) -> Profile:
    """Return `resolve_profile` of a checkpoint of which these components are loaded."""
    return resolve_profile(
        memory,
        info.family,
        {name: weight_bytes(info, name, dtype) for name in components},
        gpu,
        whole_bytes={name: 2 * count for name, count in info.num_parameters.items()},
    )


def weight_bytes(info: ModelInfo, component: str, dtype: ComputeDType) -> int:
    """Return what a component's weights take; those in fp8 stay in it, a byte each."""
    num_fp8 = info.num_fp8_parameters.get(component, 0)
    return (info.num_parameters[component] - num_fp8) * DTYPE_BYTES[dtype] + num_fp8


def _auto(
    family: str,
    component_bytes: Mapping[str, int],
    whole_bytes: Mapping[str, int],
    gpu: GpuInfo | None,
) -> Profile:
    if gpu is None:
        return load_profile("cpu_only")
    for name in PROFILES:
        profile = load_profile(name)
        num_bytes = profile.gpu_bytes(component_bytes)
        spared_bytes = max(0, profile.gpu_bytes(whole_bytes) - num_bytes)
        card_bytes = CARD_TOLERANCE * profile.min_card_gib[family] * GIB - spared_bytes
        if gpu.total_bytes >= card_bytes and gpu.free_bytes >= num_bytes:
            break
    return profile
