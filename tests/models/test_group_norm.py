"""Group normalisation with SiLU and shift as composed from torch, and its CUDA operator's fake."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from raydiff.models.group_norm import GroupNorm, group_norm_channels_last


def random_norm(*, silu):
    norm = GroupNorm(4, 12, eps=1e-3, silu=silu).requires_grad_(False)
    norm.weight.normal_(mean=1.0, std=0.3)
    norm.bias.normal_()
    return norm


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_group_norm_equals_its_definition(layout, silu, shifted):
    torch.manual_seed(0)
    norm = random_norm(silu=silu)
    x = torch.randn(3, 12, 5, 7).contiguous(memory_format=layout)
    shift = 2 * torch.randn(3, 12)
    actual = norm(x, shift=shift) if shifted else norm(x)

    groups = (x + shift[:, :, None, None] if shifted else x).double().unflatten(1, (4, 3))
    mean = groups.mean(dim=(2, 3, 4), keepdim=True)
    variance = groups.var(dim=(2, 3, 4), keepdim=True, correction=0)
    expected = ((groups - mean) / (variance + 1e-3).sqrt()).flatten(1, 2)
    expected = expected * norm.weight[:, None, None] + norm.bias[:, None, None]
    expected = F.silu(expected) if silu else expected
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    assert actual.is_contiguous(memory_format=layout)


def test_parameters_are_those_of_torch():
    ours, theirs = GroupNorm(4, 12, eps=1e-5).state_dict(), torch.nn.GroupNorm(4, 12).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_cuda_operator_keeps_shape_dtype_and_layout():
    with FakeTensorMode():
        x = torch.empty(
            (2, 12, 5, 7), device="cuda", dtype=torch.half, memory_format=torch.channels_last
        )
        weight = torch.empty(12, device="cuda", dtype=torch.half)
        y = group_norm_channels_last(x, None, weight, weight, 4, 1e-5, True)
        assert (y.shape, y.stride(), y.dtype, y.device) == (x.shape, x.stride(), x.dtype, x.device)
