"""A linear layer whose weight is stored in fp8 with scales: weight = fp8 value * scale.

On a GPU that multiplies fp8 a bfloat16 input is rounded to fp8 too, at the scale that the
checkpoint measured or else at its own largest value. Elsewhere the weight is turned back into the
input's dtype, one layer at a time.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
FP8_CAPABILITY = (8, 9)
"""CUDA compute capability from which GPUs multiply fp8."""

ALIGNMENT = 16
"""Both sizes of a weight must be multiples of it for torch._scaled_mm."""

MIN_SCALE = 1e-12
"""Of inputs that are zero throughout."""


class Scales(Protocol):
    """Which scales a layer has in the checkpoint."""

    @property
    def has_row_scales(self) -> bool: ...
    @property
    def has_input_scale(self) -> bool: ...


class Fp8Linear(nn.Module):
    """x (..., in_features) -> (..., out_features), in x's dtype."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        has_bias: bool,
        has_row_scales: bool,
        has_input_scale: bool,
    ) -> None:
        super().__init__()
        weight = torch.empty(out_features, in_features, dtype=FP8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        scale = torch.ones((out_features, 1) if has_row_scales else ())
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.input_scale = (
            nn.Parameter(torch.ones(()), requires_grad=False) if has_input_scale else None
        )
        self.bias = nn.Parameter(torch.zeros(out_features)) if has_bias else None
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.dtype == torch.bfloat16 and multiplies_fp8(x.device):
            return self.product(x)
        return F.linear(x, self.full_weight().to(x.dtype), self.bias)

    def product(self, x: Tensor) -> Tensor:
        """The layer's output by a product in fp8, of x in bfloat16."""
        rows = x.flatten(0, -2)  # (M, in_features)
        quantised, scale = self._quantise(rows)
        out = torch._scaled_mm(
            quantised,
            self.weight.t(),
            # A scale for each row on one side wants one for each row on the other.
            scale_a=scale.expand(len(rows), 1).contiguous() if self.weight_scale.ndim else scale,
            scale_b=self.weight_scale.t(),
            bias=self.bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
        return out.unflatten(0, x.shape[:-1])

    def full_weight(self) -> Tensor:
        """The weight that the fp8 values stand for, in float32."""
        return self.weight.float() * self.weight_scale

    def _quantise(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows (M, K) -> the same in fp8, and their scale: () or (M, 1) as the weight has it."""
        scale: Tensor | None = self.input_scale
        if scale is None:
            has_row_scales = self.weight_scale.ndim > 0
            sizes = rows.abs()
            scale = scale_for(sizes.amax(dim=1, keepdim=True) if has_row_scales else sizes.amax())
        return to_fp8(rows, scale), scale


def multiplies_fp8(device: torch.device) -> bool:
    """Whether a GPU has products in fp8. To compile it, it has to be marked as a constant."""
    return torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def scale_for(largest: Tensor) -> Tensor:
    """The float32 scale at which values of up to `largest` fill the range of fp8."""
    return (largest.float() / FP8_MAX).clamp(min=MIN_SCALE)


def to_fp8(values: Tensor, scale: Tensor) -> Tensor:
    """values / scale in fp8, clamped first: by torch's version the cast alone may make NaN of what
    is out of range."""
    return (values.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def use_fp8_linears(module: nn.Module, layers: Mapping[str, Scales]) -> None:
    """Put an Fp8Linear in the place of each linear layer of `module` that `layers` names.

    To be called before the weights are loaded. Layers of other kinds, and of sizes that the GPU's
    fp8 product does not take, stay: loading gives them the weight in full.
    """
    for name, scales in layers.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        linear = owner._modules.get(leaf)
        if type(linear) is not nn.Linear or not is_aligned(linear.weight.shape):
            continue
        with torch.device("meta"):
            fp8 = Fp8Linear(
                linear.in_features,
                linear.out_features,
                has_bias=linear.bias is not None,
                has_row_scales=scales.has_row_scales,
                has_input_scale=scales.has_input_scale,
            )
        owner._modules[leaf] = fp8


def is_aligned(shape: Sequence[int]) -> bool:
    """Whether a weight of this shape can be multiplied in fp8."""
    return all(size % ALIGNMENT == 0 for size in shape)


def concatenate_fp8_linears(layers: Sequence[Fp8Linear]) -> Fp8Linear:
    """One layer whose output is the layers' outputs side by side; it has a scale for each row.

    The layers take the same input, so of scales measured for it the largest serves all.
    """
    first, input_scales = layers[0], [layer.input_scale for layer in layers]
    measured: list[Tensor] = [scale for scale in input_scales if scale is not None]
    tensors = {
        # Not every device can concatenate fp8.
        "weight": torch.cat([layer.weight.view(torch.uint8) for layer in layers]).view(FP8),
        "weight_scale": torch.cat(
            [layer.weight_scale.expand(len(layer.weight), 1) for layer in layers]
        ),
    }
    if first.bias is not None:
        tensors["bias"] = torch.cat([layer.bias for layer in layers if layer.bias is not None])
    if len(measured) == len(layers):
        tensors["input_scale"] = torch.stack(measured).amax()
    return fp8_linear(tensors)


def fp8_linear(tensors: Mapping[str, Tensor]) -> Fp8Linear:
    """The layer with these parameters: weight, weight_scale and perhaps bias and input_scale."""
    with torch.device("meta"):
        layer = Fp8Linear(
            *reversed(tensors["weight"].shape),
            has_bias="bias" in tensors,
            has_row_scales=tensors["weight_scale"].ndim > 0,
            has_input_scale="input_scale" in tensors,
        )
    for name, tensor in tensors.items():
        setattr(layer, name, nn.Parameter(tensor.detach(), requires_grad=False))
    return layer
