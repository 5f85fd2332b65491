"""Triton kernels for group normalisation of channels_last maps, read as (B, P, C) with P = H*W.

Three launches: `_moments` gives each channel's mean and squared deviation over a slice of the
pixels, `_affine` joins a group's slices into one scale and offset per row and channel, `_apply`
computes silu(x * scale + offset). A row's result does not depend on the other rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# 64 channels of bf16 are one 128-byte line, and divide every channel count of SD, SDXL and their
# VAEs: no lane idles, whatever the number of channels in a group.
BLOCK_CHANNELS = 64
BLOCK_PIXELS = 128
SLICE_TILE = 32  # pixels that `_moments` loads at a time
MIN_SLICE_PIXELS = 256
MAX_SLICES = 256
BLOCK_SLICES = 64


def launch_group_norm(
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    """silu(group_norm(x + shift)) of a channels_last x (B, C, H, W); shift (B, C), (C,) or None."""
    num_rows, num_channels, height, width = x.shape
    num_pixels = height * width
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    # From the map's size alone, never the batch's: a row must not depend on the rows beside it.
    slice_pixels = max(MIN_SLICE_PIXELS, triton.cdiv(num_pixels, MAX_SLICES))
    num_slices = triton.cdiv(num_pixels, slice_pixels)
    channel_blocks = triton.cdiv(num_channels, BLOCK_CHANNELS)
    group_channels = num_channels // num_groups
    moments = x.new_empty((2, num_rows, num_slices, num_channels), dtype=torch.float32)
    affine = x.new_empty((2, num_rows, num_channels), dtype=torch.float32)
    if shift is not None and shift.stride(-1) != 1:
        shift = shift.contiguous()

    with torch.cuda.device(x.device):
        _moments[(channel_blocks, num_slices, num_rows)](
            x,
            moments[0],
            moments[1],
            num_pixels,
            num_channels,
            slice_pixels,
            block_p=SLICE_TILE,
            block_c=BLOCK_CHANNELS,
        )
        _affine[(num_groups, num_rows)](
            moments[0],
            moments[1],
            weight.contiguous(),
            bias.contiguous(),
            x if shift is None else shift,
            affine[0],
            affine[1],
            num_pixels,
            num_channels,
            group_channels,
            num_slices,
            slice_pixels,
            0 if shift is None or shift.ndim == 1 else shift.stride(0),
            float(num_pixels * group_channels),
            eps,
            has_shift=shift is not None,
            block_s=BLOCK_SLICES,
            block_c=triton.next_power_of_2(group_channels),
        )
        _apply[(triton.cdiv(num_pixels, BLOCK_PIXELS) * channel_blocks, num_rows)](
            x,
            affine[0],
            affine[1],
            y,
            num_pixels,
            num_channels,
            channel_blocks,
            silu=silu,
            block_p=BLOCK_PIXELS,
            block_c=BLOCK_CHANNELS,
        )
    return y


@triton.jit
def _moments(
    x_ptr,  # (B, P, C)
    mean_ptr,  # (B, slices, C) out
    square_ptr,  # (B, slices, C) out: sum of squared deviations from that mean
    num_pixels,
    num_channels,
    slice_pixels,
    block_p: tl.constexpr,
    block_c: tl.constexpr,
):
    channels = tl.program_id(0) * block_c + tl.arange(0, block_c)
    index = tl.program_id(1)
    row = tl.program_id(2)
    in_map = channels < num_channels
    begin = index * slice_pixels
    count = tl.minimum(slice_pixels, num_pixels - begin)
    slice_ptr = x_ptr + (row.to(tl.int64) * num_pixels + begin) * num_channels
    # Deviations from a pixel of the slice: E[x^2] - E[x]^2 would cancel where the mean is large,
    # while a member's squared deviation is at most `count` times the variance.
    pivot = tl.load(slice_ptr + channels, mask=in_map, other=0.0).to(tl.float32)
    total = tl.zeros((block_p, block_c), dtype=tl.float32)
    square = tl.zeros((block_p, block_c), dtype=tl.float32)
    for start in tl.range(0, count, block_p, num_stages=3):
        pixels = start + tl.arange(0, block_p)
        mask = (pixels < count)[:, None] & in_map[None, :]
        offsets = pixels[:, None] * num_channels + channels[None, :]
        x = tl.load(slice_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        deviation = tl.where(mask, x - pivot[None, :], 0.0)
        total += deviation
        square += deviation * deviation
    mean = tl.sum(total, axis=0) / count
    out = (row * tl.num_programs(1) + index) * num_channels + channels
    tl.store(mean_ptr + out, pivot + mean, mask=in_map)
    around_mean = tl.sum(square, axis=0) - mean * mean * count
    tl.store(square_ptr + out, tl.maximum(around_mean, 0.0), mask=in_map)


@triton.jit
def _affine(
    mean_ptr,  # (B, slices, C)
    square_ptr,  # (B, slices, C)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    shift_ptr,  # (B, C), or (C,) with a shift_stride of 0
    scale_ptr,  # (B, C) out
    offset_ptr,  # (B, C) out
    num_pixels,
    num_channels,
    group_channels,
    num_slices,
    slice_pixels,
    shift_stride,
    group_size,  # pixels * channels of a group, as a float
    eps,
    has_shift: tl.constexpr,
    block_s: tl.constexpr,
    block_c: tl.constexpr,
):
    row = tl.program_id(1)
    lanes = tl.arange(0, block_c)
    in_group = lanes < group_channels
    channels = tl.program_id(0) * group_channels + lanes
    # A shift moves a channel's mean and leaves its deviations alone.
    shift = tl.zeros((block_c,), dtype=tl.float32)
    if has_shift:
        shift += tl.load(shift_ptr + row * shift_stride + channels, mask=in_group, other=0.0).to(
            tl.float32
        )

    total = tl.zeros((block_s, block_c), dtype=tl.float32)
    for first in range(0, num_slices, block_s):
        slices = first + tl.arange(0, block_s)
        mask = (slices < num_slices)[:, None] & in_group[None, :]
        count = tl.minimum(num_pixels - slices * slice_pixels, slice_pixels).to(tl.float32)
        offsets = (row * num_slices + slices)[:, None] * num_channels + channels[None, :]
        mean = tl.load(mean_ptr + offsets, mask=mask, other=0.0) + shift[None, :]
        total += tl.where(mask, mean * count[:, None], 0.0)
    group_mean = tl.sum(tl.sum(total, axis=1), axis=0) / group_size

    total = tl.zeros((block_s, block_c), dtype=tl.float32)
    for first in range(0, num_slices, block_s):
        slices = first + tl.arange(0, block_s)
        mask = (slices < num_slices)[:, None] & in_group[None, :]
        count = tl.minimum(num_pixels - slices * slice_pixels, slice_pixels).to(tl.float32)
        offsets = (row * num_slices + slices)[:, None] * num_channels + channels[None, :]
        mean = tl.load(mean_ptr + offsets, mask=mask, other=0.0) + shift[None, :]
        square = tl.load(square_ptr + offsets, mask=mask, other=0.0)
        delta = mean - group_mean
        total += tl.where(mask, square + delta * delta * count[:, None], 0.0)
    variance = tl.sum(tl.sum(total, axis=1), axis=0) / group_size

    weight = tl.load(weight_ptr + channels, mask=in_group, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channels, mask=in_group, other=0.0).to(tl.float32)
    scale = weight / tl.sqrt(variance + eps)
    out = row * num_channels + channels
    tl.store(scale_ptr + out, scale, mask=in_group)
    tl.store(offset_ptr + out, bias + (shift - group_mean) * scale, mask=in_group)


@triton.jit
def _apply(
    x_ptr,  # (B, P, C)
    scale_ptr,  # (B, C)
    offset_ptr,  # (B, C)
    y_ptr,  # (B, P, C) out
    num_pixels,
    num_channels,
    channel_blocks,
    silu: tl.constexpr,
    block_p: tl.constexpr,
    block_c: tl.constexpr,
):
    # Last rows first: `_moments` read them last, so part of them is still in the L2 cache.
    row = tl.num_programs(1) - 1 - tl.program_id(1)
    channels = (tl.program_id(0) % channel_blocks) * block_c + tl.arange(0, block_c)
    start = (tl.program_id(0) // channel_blocks) * block_p
    pixels = tl.arange(0, block_p)
    in_map = channels < num_channels
    mask = (pixels < num_pixels - start)[:, None] & in_map[None, :]
    scale = tl.load(scale_ptr + row * num_channels + channels, mask=in_map, other=0.0)
    offset = tl.load(offset_ptr + row * num_channels + channels, mask=in_map, other=0.0)
    tile = (row.to(tl.int64) * num_pixels + start) * num_channels
    offsets = pixels[:, None] * num_channels + channels[None, :]
    x = tl.load(x_ptr + tile + offsets, mask=mask, other=0.0).to(tl.float32)
    y = x * scale[None, :] + offset[None, :]
    if silu:
        y = y * tl.sigmoid(y)
    tl.store(y_ptr + tile + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
