"""Load a checkpoint into a resident pipeline: profile first, then each component straight to the
device where it rests."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from raydiff.config import DTypeName, LTX2Config, MemoryConfig, ModelConfig, ProfileName
from raydiff.diffusion.schedule import ScheduleConfig
from raydiff.errors import ConfigError, ModelError
from raydiff.memory.gpus import GpuInfo, visible_gpus
from raydiff.memory.profiles import (
    DTYPE_BYTES,
    Profile,
    component_kind,
    compute_dtype,
    resolve_profile,
)
from raydiff.memory.residency import compute_device, resting_device
from raydiff.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from raydiff.models.clip import CLIPTextConfig, CLIPTextEncoder
from raydiff.models.unet import UNet, UNetConfig
from raydiff.pipelines.base import STAGES, Pipeline, Stage
from raydiff.pipelines.sdxl import SDXLPipeline
from raydiff.pipelines.stable_diffusion import Components, StableDiffusionPipeline
from raydiff.request import ModelInfo
from raydiff.tokenizer import CLIPTokenizer
from raydiff.weights.checkpoint import Checkpoint, open_checkpoint
from raydiff.weights.load import load_weights
from raydiff.weights.resolve import resolve_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

STAGES_OF: dict[str, frozenset[Stage]] = {
    "text_encoder": frozenset({"encode"}),
    "unet": frozenset({"denoise"}),
    "vae": frozenset({"denoise", "decode"}),
}
"""The stages that use a kind of component; init images are encoded where they are denoised."""

FAMILIES: dict[str, type[StableDiffusionPipeline]] = {
    "sd21": StableDiffusionPipeline,
    "sdxl": SDXLPipeline,
}


def load_pipeline(
    model: str | ModelInfo,
    *,
    profile: ProfileName | str = "auto",
    device: str | None = None,
    dtype: DTypeName = "auto",
    stages: Collection[Stage] = STAGES,
    config: ModelConfig | None = None,
    memory: MemoryConfig | None = None,
    ltx2: LTX2Config | None = None,
) -> Pipeline:
    """Load a model and keep it resident.

    model: alias, Hub id, local folder or single .safetensors file, or what resolve_model returned.
    profile: a memory profile, or auto. device: `cpu` or `cuda`, None takes a GPU if there is one.
    dtype: auto is float32 on CPU and bfloat16 on CUDA. stages: what it will be asked to do; the
    weights of other stages are not loaded, and where there is no GPU a pipeline of some stages is
    cpu_only, whatever the run's profile. `config` and `memory` carry the other choices of a run;
    the arguments above lie over them.
    Raises ModelError for a checkpoint that cannot be used, ConfigError for choices that clash.
    """
    config = _with(config or ModelConfig(), dtype=dtype)
    memory = _with(memory or MemoryConfig(), profile=profile)
    if isinstance(model, str):
        model = resolve_model(
            model, revision=config.revision, variant=config.variant, dtype=config.dtype
        )
    gpu = _gpu(device)
    if gpu is None and set(stages) != set(STAGES):
        memory = MemoryConfig(profile="cpu_only")
    compute = compute_dtype(config.dtype, memory, gpu)
    component_bytes = {
        name: count * DTYPE_BYTES[compute]
        for name, count in model.num_parameters.items()
        if is_needed(name, stages)
    }
    policy = resolve_profile(memory, model.family, component_bytes, gpu)
    if compute == "float32":
        # Convolutions round to TF32 by default: 10 bits of mantissa where 23 were asked for.
        torch.backends.cudnn.allow_tf32 = False
    return _build(model, policy, config, DTYPES[compute], stages)


def is_needed(component: str, stages: Collection[Stage]) -> bool:
    """Whether one of the stages uses a component."""
    return not STAGES_OF[component_kind(component)].isdisjoint(stages)


def _with(section: Any, **values: Any) -> Any:
    """Lay the arguments that were given over a config section."""
    given = {key: value for key, value in values.items() if value != "auto"}
    return type(section).model_validate({**section.model_dump(), **given})


def _gpu(device: str | None) -> GpuInfo | None:
    """Return the GPU to load onto, made torch's current one, or None where the CPU is to be used.

    It is found by UUID: CUDA may number GPUs by speed, NVML numbers them by PCI slot.
    """
    if device == "cpu" or (device is None and not torch.cuda.is_available()):
        return None
    index = torch.device(device or "cuda").index or 0
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"device {device}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs. "
            "Run `raydiff doctor`."
        )
    torch.cuda.set_device(index)
    uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    return next(gpu for gpu in visible_gpus() if gpu.uuid == uuid)


def _vae_dtype(name: DTypeName, dtype: torch.dtype) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    return torch.float32 if dtype == torch.float16 else dtype


def _build(
    info: ModelInfo,
    profile: Profile,
    config: ModelConfig,
    dtype: torch.dtype,
    stages: Collection[Stage],
) -> StableDiffusionPipeline:
    checkpoint = open_checkpoint(Path(info.path), variant=config.variant, dtype=config.dtype)
    vae_dtype = _vae_dtype(config.vae_dtype, dtype)

    def load(component: str, build: Callable[[dict[str, Any]], Any], dtype: torch.dtype) -> Any:
        if not is_needed(component, stages):
            return None
        with torch.device("meta"):
            module = build(checkpoint.config(component))
        device = resting_device(component, profile)
        return load_weights(module, checkpoint, component, device=device, dtype=dtype)

    text_encoders = {
        name: load(name, _text_encoder, dtype)
        for name in checkpoint.components
        if name.startswith("text_encoder") and is_needed(name, stages)
    }
    components = Components(
        unet=load("unet", lambda config: UNet(UNetConfig.from_dict(config)), dtype),
        vae=load("vae", lambda c: AutoencoderKL(AutoencoderKLConfig.from_dict(c)), vae_dtype),
        text_encoders=text_encoders,
        tokenizers={
            name: _tokenizer(checkpoint, name, encoder) for name, encoder in text_encoders.items()
        },
        schedule=ScheduleConfig.from_dict(checkpoint.config("scheduler")),
        has_zero_negative=bool(
            checkpoint.config("model_index").get("force_zeros_for_empty_prompt", False)
        ),
    )
    prepare(components, profile)
    return FAMILIES[info.family](
        info=info,
        profile=profile,
        components=components,
        dtype=dtype,
        vae_dtype=vae_dtype,
        is_compiled=config.compile,
    )


def _text_encoder(config: dict[str, Any]) -> CLIPTextEncoder:
    return CLIPTextEncoder(CLIPTextConfig.from_dict(config))


def _tokenizer(checkpoint: Checkpoint, name: str, encoder: CLIPTextEncoder) -> CLIPTokenizer:
    """Read an encoder's tokenizer; ids that the encoder has no row for would fail on the GPU."""
    folder = checkpoint.tokenizer_folder(name)
    tokenizer = CLIPTokenizer.from_folder(folder)
    for what, has, takes in (
        ("tokens", tokenizer.vocab_size, encoder.config.vocab_size),
        ("positions", tokenizer.max_length, encoder.config.max_position_embeddings),
    ):
        if has > takes:
            raise ModelError(
                f"{folder}: the tokenizer has {has} {what}, {name} has {takes}. "
                "They are of different checkpoints: download both again."
            )
    return tokenizer


def prepare(components: Components, profile: Profile) -> None:
    """Fuse projections, and order memory as the device that computes wants it."""

    def is_on_gpu(component: str) -> bool:
        return compute_device(component, profile).type == "cuda"

    for encoder in components.text_encoders.values():
        encoder.prepare_for_inference()
    if components.unet is not None:
        components.unet.prepare_for_inference(channels_last=is_on_gpu("unet"))
    if components.vae is not None:
        components.vae.prepare_for_inference(channels_last=is_on_gpu("vae"))
