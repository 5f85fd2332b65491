"""Load a checkpoint into a resident pipeline: profile first, then each component straight to the
device where it rests."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from raydiff.config import DTypeName, LTX2Config, MemoryConfig, ModelConfig, ProfileName
from raydiff.errors import ConfigError
from raydiff.memory.gpus import GpuInfo, visible_gpus
from raydiff.memory.profiles import compute_dtype, model_profile
from raydiff.pipelines.base import Pipeline
from raydiff.pipelines.loading import DTYPES, Loading
from raydiff.pipelines.ltx2.load import load_ltx2
from raydiff.pipelines.stable_diffusion_load import load_stable_diffusion
from raydiff.request import ModelInfo
from raydiff.weights.checkpoint import open_checkpoint
from raydiff.weights.components import STAGES, Stage, needed_by
from raydiff.weights.resolve import resolve_model


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
    cpu_only, whatever the run's profile. `config`, `memory` and `ltx2` carry the other choices of
    a run; the arguments above lie over them.
    Raises ModelError for a checkpoint that cannot be used, ConfigError for choices that clash.
    """
    config = _with(config or ModelConfig(), dtype=dtype)
    memory = _with(memory or MemoryConfig(), profile=profile)
    ltx2 = ltx2 or LTX2Config()
    needed = needed_by(stages, ltx2)
    if isinstance(model, str):
        model = resolve_model(
            model,
            revision=config.revision,
            variant=config.variant,
            dtype=config.dtype,
            needed=needed,
        )
    gpu = _gpu(device)
    if gpu is None and set(stages) != set(STAGES):
        memory = MemoryConfig(profile="cpu_only")
    compute = compute_dtype(config.dtype, memory, gpu)
    policy = model_profile(memory, model, compute, needed(model.num_parameters), gpu)
    if compute == "float32":
        # Convolutions round to TF32 by default: 10 bits of mantissa where 23 were asked for.
        torch.backends.cudnn.allow_tf32 = False
    loading = Loading(
        info=model,
        checkpoint=open_checkpoint(
            Path(model.path), variant=config.variant, dtype=config.dtype, needed=needed
        ),
        profile=policy,
        config=config,
        ltx2=ltx2,
        stages=frozenset(stages),
        dtype=DTYPES[compute],
    )
    return load_ltx2(loading) if model.family == "ltx2" else load_stable_diffusion(loading)


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
