"""Group normalisation with an optional SiLU, in one place because torch's CUDA kernel turns
channels_last maps into contiguous ones: there a Triton kernel keeps the layout."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydiff.models.triton_support import can_run_triton


class GroupNorm(nn.Module):
    """nn.GroupNorm (same parameters), then SiLU where `silu` is set."""

    def __init__(
        self, num_groups: int, num_channels: int, *, eps: float, silu: bool = False
    ) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.eps = eps
        self.silu = silu
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """Normalise x (B, C, H, W), or x plus `shift` (B, C) or (C,) where one is given."""
        return group_norm_silu(
            x, self.num_groups, self.weight, self.bias, self.eps, silu=self.silu, shift=shift
        )


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    silu: bool = True,
    shift: Tensor | None = None,
) -> Tensor:
    """silu(group_norm(x + shift)) in x's dtype and layout: x (B, C, H, W), shift (B, C) or (C,)."""
    # Under torch.compile too: Inductor's own reductions over channels_last maps are slower.
    if can_run_triton(x, weight) and x.is_contiguous(memory_format=torch.channels_last):
        return group_norm_channels_last(x, shift, weight, bias, num_groups, eps, silu)
    if shift is not None:
        x = x + shift[..., None, None]
    x = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(x) if silu else x


@torch.library.custom_op(
    "raydiff::group_norm",
    mutates_args=(),
    device_types="cuda",
    tags=(torch.Tag.needs_exact_strides,),
)
def group_norm_channels_last(
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    """`group_norm_silu` of a channels_last x on CUDA, statistics in fp32; no gradients."""
    from raydiff.models.group_norm_triton import launch_group_norm

    return launch_group_norm(x, shift, weight, bias, num_groups, eps, silu)


@group_norm_channels_last.register_fake
def _(
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    return torch.empty_like(x)
