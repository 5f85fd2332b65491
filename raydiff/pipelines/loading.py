"""What the families' loaders share: which components some stages need, and how one is loaded."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from raydiff.config import DTypeName, LTX2Config, ModelConfig
from raydiff.errors import ModelError
from raydiff.memory.profiles import Profile
from raydiff.memory.residency import compute_device, resting_device
from raydiff.pipelines.base import Stage
from raydiff.request import ModelInfo
from raydiff.weights.checkpoint import Checkpoint
from raydiff.weights.load import load_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

STAGES_OF: dict[str, frozenset[Stage]] = {
    "text_encoder": frozenset({"encode"}),
    "text_encoder_2": frozenset({"encode"}),
    # Their projections belong to a text's encoding, the rest of them to the transformer.
    "connectors": frozenset({"encode", "denoise"}),
    "unet": frozenset({"denoise"}),
    "transformer": frozenset({"denoise"}),
    "refine_transformer": frozenset({"denoise"}),
    "latent_upsampler": frozenset({"denoise"}),
    # Init images and first frames are encoded where they are denoised.
    "vae": frozenset({"denoise", "decode"}),
    "audio_vae": frozenset({"decode"}),
    "vocoder": frozenset({"decode"}),
}
"""The stages that use a component."""

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
        with torch.device("meta"):
            module = build(self.checkpoint.config(component))
        return load_weights(
            module,
            self.checkpoint,
            component,
            device=resting_device(component, self.profile),
            dtype=self.dtype if dtype is None else dtype,
        )


def needed_components(
    components: Collection[str], stages: Collection[Stage], ltx2: LTX2Config
) -> frozenset[str]:
    """Return those of a checkpoint's components that the stages use."""
    using = set(stages)
    if "transformer" in components and ltx2.text_encoder != "gemma3":
        using.discard("encode")  # Features that come from elsewhere take no weights.
    return frozenset(name for name in components if not STAGES_OF[name].isdisjoint(using))


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
