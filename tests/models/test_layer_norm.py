"""Addition and layer normalisation as composed from torch, and the CUDA operators' fakes."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from raydiff.models.layer_norm import AddLayerNorm, add_layer_norm_rows, layer_norm_rows


def random_norm(channels):
    norm = AddLayerNorm(channels, eps=1e-3).requires_grad_(False)
    norm.weight.normal_(mean=1.0, std=0.3)
    norm.bias.normal_()
    return norm


@pytest.mark.parametrize("has_delta", [False, True])
def test_sum_and_norm_equal_their_definitions(has_delta):
    torch.manual_seed(0)
    norm = random_norm(14)
    x, delta = 3 + torch.randn(2, 5, 14), 2 * torch.randn(2, 5, 3 * 14)[..., 14:28]
    total, normed = norm(x, delta if has_delta else None)
    expected = (x + delta if has_delta else x).double()
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)
    variance, mean = torch.var_mean(expected, dim=-1, keepdim=True, correction=0)
    expected = (expected - mean) / (variance + 1e-3).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(normed.double(), expected, rtol=1e-5, atol=1e-5)


def test_parameters_are_those_of_torch():
    ours, theirs = AddLayerNorm(12).state_dict(), torch.nn.LayerNorm(12).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_cuda_operators_give_contiguous_rows():
    with FakeTensorMode():
        x = torch.empty_strided((2, 5, 14), (210, 42, 1), device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(14, device="cuda", dtype=torch.bfloat16)
        total, normed = add_layer_norm_rows(x, x, weight, weight, 1e-5)
        for y in (total, normed, layer_norm_rows(x, weight, weight, 1e-5)):
            assert (y.shape, y.stride()) == ((2, 5, 14), (70, 14, 1))
            assert (y.dtype, y.device) == (x.dtype, x.device)
