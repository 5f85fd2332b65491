"""Triton kernel for layer normalisation with an addition before it: one program to a row, which
stays in registers, so that both inputs are read once and both results written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

WARP_FEATURES = 2048
"""Features to a warp: rows of up to 2048 need no exchange between warps."""


def launch_add_layer_norm(
    x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + delta and its normalisation; features adjacent, rows anywhere: (..., C)."""
    total = x.new_empty(x.shape)
    return total, _launch(x, delta, total, weight, bias, eps)


def launch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer normalisation of x (..., C), its features adjacent."""
    return _launch(x, None, None, weight, bias, eps)


def _launch(
    x: Tensor,
    delta: Tensor | None,
    total: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y
    num_features = x.shape[-1]
    rows = x.flatten(0, -2)  # (rows, C): a view, unless rows are spaced unevenly
    delta_rows = rows if delta is None else delta.flatten(0, -2)
    block = triton.next_power_of_2(num_features)
    with torch.cuda.device(x.device):
        _add_layer_norm[(rows.shape[0],)](
            rows,
            delta_rows,
            weight.contiguous(),
            bias.contiguous(),
            y if total is None else total,
            y,
            rows.stride(0),
            delta_rows.stride(0),
            num_features,
            eps,
            has_delta=delta is not None,
            block=block,
            num_warps=max(1, block // WARP_FEATURES),
        )
    return y


@triton.jit
def _add_layer_norm(
    x_ptr,  # (rows, C)
    delta_ptr,  # (rows, C)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    total_ptr,  # (rows, C) out, where there is a delta
    y_ptr,  # (rows, C) out
    x_stride,
    delta_stride,
    num_features,
    eps,
    has_delta: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    features = tl.arange(0, block)
    mask = features < num_features
    x = tl.load(x_ptr + row * x_stride + features, mask=mask, other=0.0).to(tl.float32)
    if has_delta:
        x += tl.load(delta_ptr + row * delta_stride + features, mask=mask, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * num_features + features, total, mask=mask)
        x = total.to(tl.float32)  # what the next layers will read is what is normalised
    mean = tl.sum(x, axis=0) / num_features
    centred = tl.where(mask, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / num_features
    weight = tl.load(weight_ptr + features, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + features, mask=mask, other=0.0).to(tl.float32)
    y = centred * (1.0 / tl.sqrt(variance + eps)) * weight + bias
    tl.store(y_ptr + row * num_features + features, y.to(y_ptr.dtype.element_ty), mask=mask)
