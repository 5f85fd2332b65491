"""What the families' loaders share: how the components that some stages need are loaded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from raydiff.config import DTypeName, LTX2Config, ModelConfig
from raydiff.errors import ModelError
from raydiff.memory.profiles import Profile
from raydiff.memory.residency import compute_device, resting_device
from raydiff.models.meta import on_meta
from raydiff.request import ModelInfo
from raydiff.weights.checkpoint import Checkpoint
from raydiff.weights.components import Stage, needed_components
from raydiff.weights.load import load_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True, slots=True)
class Loading:
    """One checkpoint on its way to a resident pipeline."""

    info: ModelInfo
    checkpoint: Checkpoint
    profile: Profile
    config: ModelConfig
    ltx2: LTX2Config
    stages: frozenset[Stage]
    dtype: torch.dtype

    @property
    def needed(self) -> frozenset[str]:
        """The checkpoint's components that are loaded."""
        return needed_components(self.checkpoint.components, self.stages, self.ltx2)

    @property
    def vae_dtype(self) -> torch.dtype:
        """What autoencoders compute in."""
        return _vae_dtype(self.config.vae_dtype, self.dtype)

    def load(
        self,
        component: str,
        build: Callable[[dict[str, Any]], M],
        *,
        dtype: torch.dtype | None = None,
    ) -> M | None:
        """Return a component where it rests, None for one that is not needed.

        `build` makes it from its config; dtype: the pipeline's, unless it is given.
        """
        if component not in self.needed:
            return None
        with on_meta():
            module = build(self.checkpoint.config(component))
        return load_weights(
            module,
            self.checkpoint,
            component,
            device=resting_device(component, self.profile),
            dtype=self.dtype if dtype is None else dtype,
        )


def is_on_gpu(component: str, profile: Profile) -> bool:
    """Whether a component computes on a GPU."""
    return compute_device(component, profile).type == "cuda"


def check_tokenizer(folder: Path, encoder: str, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Compare what a tokenizer has with what its encoder takes, by what they are counts of: ids
    that the encoder has no row for would fail on the GPU."""
    for what, (has, takes) in sizes.items():
        if has > takes:
            raise ModelError(
                f"{folder}: the tokenizer has {has} {what}, {encoder} has {takes}. "
                "They are of different checkpoints: download both again."
            )


def _vae_dtype(name: DTypeName, dtype: torch.dtype) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    return torch.float32 if dtype == torch.float16 else dtype
