"""Adding and enlarging maps as composed from torch, and the CUDA operators' fakes."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from raydiff.models.feature_map import (
    add_channels_last,
    add_maps,
    double_channels_last,
    enlarge_nearest,
)


def random_map(*shape, layout=torch.channels_last):
    return torch.randn(shape).contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_maps_and_bias_add_up(layout):
    torch.manual_seed(0)
    x, y = (random_map(2, 12, 5, 7, layout=layout) for _ in range(2))
    bias = torch.randn(12)
    assert torch.equal(add_maps(x, y, None), x + y)
    actual = add_maps(x, y, bias)
    expected = x.double() + y.double() + bias.double().view(1, 12, 1, 1)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)
    assert actual.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("size", [(10, 14), (9, 14), (10, 13)])
def test_neighbours_are_repeated(size):
    torch.manual_seed(0)
    x = random_map(2, 3, 5, 7)
    y = enlarge_nearest(x, size)
    rows, columns = (
        torch.tensor([position * old // new for position in range(new)])
        for old, new in zip((5, 7), size, strict=True)
    )
    assert torch.equal(y, x[:, :, rows][:, :, :, columns])
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_cuda_operators_keep_channels_last():
    with FakeTensorMode():
        x, bias = (
            torch.empty_strided(shape, strides, device="cuda", dtype=torch.half)
            for shape, strides in (((2, 12, 5, 7), (420, 1, 84, 12)), ((12,), (1,)))
        )
        y = add_channels_last(x, x, bias)
        assert (y.shape, y.stride(), y.dtype, y.device) == (x.shape, x.stride(), x.dtype, x.device)
        y = double_channels_last(x)
        assert (y.shape, y.stride()) == ((2, 12, 10, 14), (1680, 1, 168, 12))
        assert (y.dtype, y.device) == (x.dtype, x.device)
