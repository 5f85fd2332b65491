"""Triton kernels that add and enlarge channels_last maps, read as (pixels, C)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_PIXELS = 64
BLOCK_CHANNELS = 64  # one 128-byte line of bf16


def launch_add(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """x + y + bias for channels_last x, y (B, C, H, W) and bias (C,)."""
    total = torch.empty_like(x)
    if total.numel() == 0:
        return total
    num_channels = x.shape[1]
    num_pixels = x.numel() // num_channels
    grid = (triton.cdiv(num_pixels, BLOCK_PIXELS), triton.cdiv(num_channels, BLOCK_CHANNELS))
    with torch.cuda.device(x.device):
        _add[grid](
            x,
            y,
            bias.contiguous(),
            total,
            num_pixels,
            num_channels,
            block_p=BLOCK_PIXELS,
            block_c=BLOCK_CHANNELS,
        )
    return total


def launch_double(x: Tensor) -> Tensor:
    """Channels_last (B, C, H, W) -> (B, C, 2H, 2W), every pixel four times."""
    num_rows, num_channels, height, width = x.shape
    y = torch.empty(
        (num_rows, num_channels, 2 * height, 2 * width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    if y.numel() == 0:
        return y
    channel_blocks = triton.cdiv(num_channels, BLOCK_CHANNELS)
    grid = (num_rows * height, triton.cdiv(width, BLOCK_PIXELS) * channel_blocks)
    with torch.cuda.device(x.device):
        _double[grid](
            x,
            y,
            width,
            num_channels,
            channel_blocks,
            block_p=BLOCK_PIXELS,
            block_c=BLOCK_CHANNELS,
        )
    return y


@triton.jit
def _add(
    x_ptr,  # (P, C)
    y_ptr,  # (P, C)
    bias_ptr,  # (C,)
    total_ptr,  # (P, C) out
    num_pixels,
    num_channels,
    block_p: tl.constexpr,
    block_c: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * block_p
    pixels = tl.arange(0, block_p)
    channels = tl.program_id(1) * block_c + tl.arange(0, block_c)
    in_map = channels < num_channels
    mask = (pixels < num_pixels - start)[:, None] & in_map[None, :]
    offsets = start * num_channels + (pixels[:, None] * num_channels + channels[None, :])
    bias = tl.load(bias_ptr + channels, mask=in_map, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    total = x + (y + bias[None, :])
    tl.store(total_ptr + offsets, total.to(total_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _double(
    x_ptr,  # (B * H, W, C)
    y_ptr,  # (B * H, 2, W, 2, C) out
    width,
    num_channels,
    channel_blocks,
    block_p: tl.constexpr,
    block_c: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64) * width * num_channels
    pixels = (tl.program_id(1) // channel_blocks) * block_p + tl.arange(0, block_p)
    channels = (tl.program_id(1) % channel_blocks) * block_c + tl.arange(0, block_c)
    mask = (pixels < width)[:, None] & (channels < num_channels)[None, :]
    starts = pixels[:, None] * num_channels
    x = tl.load(x_ptr + line + (starts + channels[None, :]), mask=mask, other=0.0)
    upper = y_ptr + 4 * line + (2 * starts + channels[None, :])
    lower = upper + 2 * width * num_channels
    tl.store(upper, x, mask=mask)
    tl.store(upper + num_channels, x, mask=mask)
    tl.store(lower, x, mask=mask)
    tl.store(lower + num_channels, x, mask=mask)
