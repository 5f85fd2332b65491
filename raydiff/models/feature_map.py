"""Adding and enlarging feature maps (B, C, H, W): on CUDA a Triton kernel for channels_last memory,
where torch's kernels for a bias and for nearest neighbours run far below the memory's speed."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydiff.models.triton_support import can_run_triton


def use_channels_last(module: nn.Module) -> None:
    """Order the weights of convolutions as tensor cores read them, in place."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)


def add_maps(x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """x + y (B, C, H, W), plus `bias` (C,) where one is given."""
    if bias is None:
        return x + y
    if (
        can_run_triton(x, y, bias)
        and x.dtype == y.dtype
        and x.is_contiguous(memory_format=torch.channels_last)
        and y.is_contiguous(memory_format=torch.channels_last)
    ):
        return add_channels_last(x, y, bias)
    return x + (y + bias[:, None, None])


def enlarge_nearest(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> (B, C, *size) by nearest neighbours."""
    is_double = size == (2 * x.shape[2], 2 * x.shape[3])
    if is_double and can_run_triton(x) and x.is_contiguous(memory_format=torch.channels_last):
        return double_channels_last(x)
    return F.interpolate(x, size=size, mode="nearest")


@torch.library.custom_op(
    "raydiff::add_maps",
    mutates_args=(),
    device_types="cuda",
    tags=(torch.Tag.needs_exact_strides,),
)
def add_channels_last(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """`add_maps` of channels_last maps on CUDA, rounded once; no gradients."""
    from raydiff.models.feature_map_triton import launch_add

    return launch_add(x, y, bias)


@add_channels_last.register_fake
def _(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op(
    "raydiff::double_nearest",
    mutates_args=(),
    device_types="cuda",
    tags=(torch.Tag.needs_exact_strides,),
)
def double_channels_last(x: Tensor) -> Tensor:
    """`enlarge_nearest` of a channels_last map to twice its height and width; no gradients."""
    from raydiff.models.feature_map_triton import launch_double

    return launch_double(x)


@double_channels_last.register_fake
def _(x: Tensor) -> Tensor:
    rows, channels, height, width = x.shape
    return torch.empty(
        (rows, channels, 2 * height, 2 * width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
