"""Layer normalisation of a residual stream, joined with the addition that comes before it: one
Triton kernel on CUDA, where each would otherwise be a pass over memory of its own."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydiff.models.triton_support import can_run_triton


class AddLayerNorm(nn.Module):
    """nn.LayerNorm (same parameters) of a stream that is still to take up its next update."""

    def __init__(self, num_features: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x and delta (B, N, C) -> x + delta, and that normalised; just x where delta is None."""
        return add_layer_norm(x, delta, self.weight, self.bias, self.eps)


def add_layer_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(x + delta, layer_norm(x + delta)) over the last dimension: x and delta (..., C)."""
    tensors = (x, weight, bias) if delta is None else (x, weight, bias, delta)
    if can_run_triton(*tensors) and x.stride(-1) == 1 and x.shape[-1] <= MAX_FEATURES:
        if delta is None:
            return x, layer_norm_rows(x, weight, bias, eps)
        if delta.stride(-1) == 1 and (delta.shape, delta.dtype) == (x.shape, x.dtype):
            return add_layer_norm_rows(x, delta, weight, bias, eps)
    if delta is not None:
        x = x + delta
    return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps)


MAX_FEATURES = 8192
"""A row is held in registers."""


@torch.library.custom_op(
    "raydiff::add_layer_norm",
    mutates_args=(),
    device_types="cuda",
    tags=(torch.Tag.needs_exact_strides,),
)
def add_layer_norm_rows(
    x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` on CUDA, statistics in fp32, both results contiguous; no gradients."""
    from raydiff.models.layer_norm_triton import launch_add_layer_norm

    return launch_add_layer_norm(x, delta, weight, bias, eps)


@add_layer_norm_rows.register_fake
def _(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op(
    "raydiff::layer_norm",
    mutates_args=(),
    device_types="cuda",
    tags=(torch.Tag.needs_exact_strides,),
)
def layer_norm_rows(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer normalisation on CUDA, statistics in fp32, the result contiguous; no gradients."""
    from raydiff.models.layer_norm_triton import launch_layer_norm

    return launch_layer_norm(x, weight, bias, eps)


@layer_norm_rows.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)
