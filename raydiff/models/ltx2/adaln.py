"""Adaptive layer normalisation of LTX-2: scales, shifts and gates from the noise level.

A stream of N tokens has G noise levels, each for N / G tokens in a row: one for all, one for each
latent frame (where an image is given as the first), or one for each token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydiff.models.unet import EmbeddingMLP, sinusoidal_embedding

_SINUSOID_WIDTH = 256


class AdaLayerNormSingle(nn.Module):
    """Turns timesteps into `num_values` vectors of the stream's width."""

    def __init__(self, dim: int, num_values: int) -> None:
        super().__init__()
        self.num_values = num_values
        self.emb = TimestepEmbedder(dim)
        self.linear = nn.Linear(dim, num_values * dim)

    def forward(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(B, G) -> values (B, G, num_values, dim), and the embedded timesteps (B, G, dim)."""
        embedded = self.emb(timesteps)
        values = self.linear(F.silu(embedded))
        return values.unflatten(-1, (self.num_values, -1)), embedded


class TimestepEmbedder(nn.Module):
    """Sinusoids of the timestep through two linear layers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.timestep_embedder = EmbeddingMLP(_SINUSOID_WIDTH, dim)

    def forward(self, timesteps: Tensor) -> Tensor:
        """(B, G) -> (B, G, dim)."""
        sinusoids = sinusoidal_embedding(timesteps.flatten(), _SINUSOID_WIDTH)
        dtype = self.timestep_embedder.linear_1.weight.dtype
        return self.timestep_embedder(sinusoids.to(dtype)).unflatten(0, timesteps.shape)


def layer_values(table: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    """A layer's own table (R, C) added to the step's values (B, G, R, C): R tensors (B, G, C)."""
    return (table + values).unbind(2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift: x (B, N, C), shift and scale (B or 1, G, C)."""
    groups = x.unflatten(1, (scale.shape[1], -1))  # (B, G, N / G, C)
    return torch.addcmul(shift[:, :, None], groups, 1 + scale[:, :, None]).flatten(1, 2)


def add_gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """x + update * gate: x and update (B, N, C), gate (B, G, C)."""
    num_groups = gate.shape[1]
    groups = x.unflatten(1, (num_groups, -1))
    update = update.unflatten(1, (num_groups, -1))
    return torch.addcmul(groups, update, gate[:, :, None]).flatten(1, 2)
