"""Random weights for diffusers' parts of LTX-2, and our parts with the same weights."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from raydiff.models.meta import on_meta

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def with_random_weights(vae: M, seed: int = 0) -> M:
    """Make every parameter of an autoencoder random, and its latents' statistics too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in vae.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.3 * noise)
    mean, std = vae.get_buffer("latents_mean"), vae.get_buffer("latents_std")
    mean.copy_(torch.randn(mean.shape, generator=generator))
    std.copy_(0.5 + torch.rand(std.shape, generator=generator))
    return vae.eval()


def with_weights_of(reference: Any, build: Callable[[Mapping[str, Any]], M]) -> M:
    """Return what is built from the reference's config, with the reference's tensors."""
    with on_meta():
        model = build({**reference.config, "_class_name": type(reference).__name__})
    model.load_state_dict(reference.state_dict(), strict=True, assign=True)
    return model
