"""GEGLU as composed from torch, and its CUDA operator's fake."""

import math

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from raydiff.models.geglu import GEGLU, geglu, geglu_contiguous


def test_geglu_gates_with_the_exact_gelu():
    torch.manual_seed(0)
    x = 2 * torch.randn(3, 5, 14, dtype=torch.float64)
    expected = torch.empty(3, 5, 7, dtype=torch.float64)
    for index in torch.cartesian_prod(*map(torch.arange, expected.shape)).tolist():
        row, token, feature = index
        value, gate = x[row, token, feature].item(), x[row, token, feature + 7].item()
        expected[row, token, feature] = value * gate * 0.5 * (1 + math.erf(gate / math.sqrt(2)))
    torch.testing.assert_close(geglu(x), expected)


def test_module_projects_first():
    torch.manual_seed(0)
    layer, x = GEGLU(6, 10), torch.randn(2, 3, 6)
    assert [name for name, _ in layer.named_parameters()] == ["proj.weight", "proj.bias"]
    assert torch.equal(layer(x), geglu(layer.proj(x)))
    assert layer(x).shape == (2, 3, 10)


def test_cuda_operator_halves_the_last_dimension():
    with FakeTensorMode():
        x = torch.empty(2, 5, 14, device="cuda", dtype=torch.float16)
        y = geglu_contiguous(x)
        assert (y.shape, y.dtype, y.device) == ((2, 5, 7), x.dtype, x.device)
