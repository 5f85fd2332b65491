"""Linear layers in fp8: rounding, scales, the CPU's way, and fusing."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from raydiff.models.fp8_linear import (
    FP8,
    FP8_MAX,
    Fp8Linear,
    concatenate_fp8_linears,
    scale_for,
    to_fp8,
    use_fp8_linears,
)
from raydiff.models.ltx2.attention import concatenate_linears


class Scales(NamedTuple):
    has_row_scales: bool = False
    has_input_scale: bool = False


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantised(
    linear: nn.Linear, *, has_row_scales: bool, input_scale: float | None = None
) -> Fp8Linear:
    weight = linear.weight.detach()
    largest = weight.abs().amax(dim=1, keepdim=True) if has_row_scales else weight.abs().amax()
    layer = Fp8Linear(
        linear.in_features,
        linear.out_features,
        has_bias=linear.bias is not None,
        has_row_scales=has_row_scales,
        has_input_scale=input_scale is not None,
    )
    layer.weight_scale.copy_(scale_for(largest))
    layer.weight.copy_(to_fp8(weight, layer.weight_scale))
    if layer.bias is not None:
        layer.bias.copy_(linear.bias)
    if layer.input_scale is not None:
        layer.input_scale.fill_(input_scale)
    return layer


@torch.no_grad()
def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out - expected).float().norm() / expected.float().norm())


@pytest.mark.parametrize("has_row_scales", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_is_the_rounded_weights(has_row_scales: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(64, 48)
    linear.weight.data *= torch.logspace(-3, 3, 48)[:, None]
    layer = quantised(linear, has_row_scales=has_row_scales)
    layer.bias.data = layer.bias.to(dtype)
    x = normal(3, 7, 64).to(dtype)
    out = layer(x)
    assert out.dtype == dtype
    assert out.shape == (3, 7, 48)
    rounded = layer.weight.float() * layer.weight_scale
    expected = nn.functional.linear(x.float(), rounded, layer.bias.float())
    assert error(out, expected) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert error(out, linear(x.float())) < 0.05


def test_row_scales_keep_small_rows() -> None:
    linear = nn.Linear(64, 32, bias=False)
    linear.weight.data *= torch.logspace(-6, 2, 32)[:, None]
    row_errors = {}
    for has_row_scales in (False, True):
        weight = quantised(linear, has_row_scales=has_row_scales).full_weight()
        row_errors[has_row_scales] = error(weight[0], linear.weight[0])
    assert row_errors[True] < 0.04
    assert row_errors[False] > 0.9


def test_values_are_clamped_before_the_cast() -> None:
    values = torch.tensor([1e4, -1e4, 447.0, torch.inf, 0.0])
    cast = to_fp8(values, torch.tensor(1.0)).float()
    assert cast.tolist() == [FP8_MAX, -FP8_MAX, 448.0, FP8_MAX, 0.0]


def test_a_weight_of_zeros_stays_finite() -> None:
    layer = quantised(nn.Linear(16, 16), has_row_scales=True)
    layer.weight_scale.copy_(scale_for(torch.zeros(16, 1)))
    assert to_fp8(torch.zeros(16, 16), layer.weight_scale).float().isfinite().all()


def test_only_linear_layers_of_fitting_size_are_replaced() -> None:
    with torch.device("meta"):
        module = nn.ModuleDict(
            {
                "fits": nn.Linear(32, 16),
                "rows": nn.Linear(32, 16, bias=False),
                "uneven": nn.Linear(32, 20),
                "conv": nn.Conv1d(16, 16, 3),
                "other": nn.Linear(32, 16),
            }
        )
    layers = {
        "fits": Scales(has_input_scale=True),
        "rows": Scales(has_row_scales=True),
        "uneven": Scales(),
        "conv": Scales(),
    }
    use_fp8_linears(module, layers)
    kinds = {name: type(layer) for name, layer in module.items()}
    assert kinds["fits"] is kinds["rows"] is Fp8Linear
    assert kinds["uneven"] is kinds["other"] is nn.Linear
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert shapes["fits.weight_scale"] == shapes["fits.input_scale"] == ()
    assert shapes["rows.weight_scale"] == (16, 1)
    assert "rows.bias" not in shapes
    assert module["fits"].weight.is_meta
    assert module["fits"].weight.dtype == FP8


@pytest.mark.parametrize("has_row_scales", [False, True])
def test_fused_layers_give_the_same(has_row_scales: bool) -> None:
    linears = [nn.Linear(32, size) for size in (16, 32, 48)]
    layers = [
        quantised(linear, has_row_scales=has_row_scales, input_scale=scale)
        for linear, scale in zip(linears, (0.5, 2.0, 1.0), strict=True)
    ]
    fused = concatenate_fp8_linears(layers)
    x = normal(5, 32)
    assert torch.equal(fused(x), torch.cat([layer(x) for layer in layers], dim=-1))
    assert fused.input_scale is not None
    assert fused.input_scale.item() == 2.0
    layers[1].input_scale = None
    assert concatenate_fp8_linears(layers).input_scale is None


def test_a_mix_of_fp8_and_full_layers_is_fused_in_full() -> None:
    linear = nn.Linear(32, 16)
    layer = quantised(nn.Linear(32, 16), has_row_scales=False)
    fused = concatenate_linears(linear, layer)
    assert type(fused) is nn.Linear
    x = normal(5, 32)
    expected = torch.cat([linear(x), layer(x)], dim=-1)
    torch.testing.assert_close(fused(x), expected, rtol=1e-5, atol=1e-6)


def with_bfloat16_bias(layer: Fp8Linear) -> Fp8Linear:
    assert layer.bias is not None
    layer.bias.data = layer.bias.data.bfloat16()
    return layer


@pytest.mark.parametrize("has_row_scales", [False, True])
@pytest.mark.parametrize("input_scale", [None, 0.01])
def test_the_product_in_fp8_is_near_the_full_one(
    has_row_scales: bool, input_scale: float | None
) -> None:
    linear = nn.Linear(128, 96)
    layer = with_bfloat16_bias(
        quantised(linear, has_row_scales=has_row_scales, input_scale=input_scale)
    )
    x = normal(3, 10, 128)
    out = layer.product(x.bfloat16())
    assert (out.dtype, out.shape) == (torch.bfloat16, (3, 10, 96))
    assert error(out, linear(x)) < 0.05
    x[0, 0, 0] = 1e4
    assert layer.product(x.bfloat16()).isfinite().all()


def test_dynamic_row_scales_keep_small_tokens() -> None:
    linear = nn.Linear(128, 96, bias=False)
    x = normal(8, 128) * torch.logspace(-6, 2, 8)[:, None]
    expected = linear(x)
    errors = {
        has_row_scales: error(
            quantised(linear, has_row_scales=has_row_scales).product(x.bfloat16())[0], expected[0]
        )
        for has_row_scales in (False, True)
    }
    assert errors[True] < 0.05
    assert errors[False] > 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("has_row_scales", [False, True])
@pytest.mark.parametrize("input_scale", [None, 0.01])
def test_a_gpu_computes_in_fp8(has_row_scales: bool, input_scale: float | None) -> None:
    linear = nn.Linear(512, 256)
    layer = quantised(linear, has_row_scales=has_row_scales, input_scale=input_scale)
    layer = with_bfloat16_bias(layer).cuda()
    x = normal(3, 70, 512)
    out = layer(x.cuda().bfloat16())
    assert torch.equal(out, layer.product(x.cuda().bfloat16()))
    assert error(out.cpu(), linear(x)) < 0.05
