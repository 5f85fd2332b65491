"""GEGLU: value * gelu(gate) for the two halves of a projection; one Triton kernel on CUDA."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydiff.models.triton_support import can_run_triton


class GEGLU(nn.Module):
    """Project to twice `out_features`, gate one half with the exact GELU of the other."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_features, 2 * out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return geglu(self.proj(x))


def geglu(x: Tensor) -> Tensor:
    """(..., 2*D) -> (..., D): the first half times the GELU (erf, not tanh) of the second."""
    if can_run_triton(x) and x.is_contiguous():
        return geglu_contiguous(x)
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


@torch.library.custom_op(
    "raydiff::geglu",
    mutates_args=(),
    device_types="cuda",
    tags=(torch.Tag.needs_exact_strides,),
)
def geglu_contiguous(x: Tensor) -> Tensor:
    """`geglu` of a contiguous x on CUDA, computed in fp32; no gradients."""
    from raydiff.models.geglu_triton import launch_geglu

    return launch_geglu(x)


@geglu_contiguous.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
