"""The Triton kernels against the torch compositions they stand for."""

import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

from raydiff.models.attention import SpatialTransformer
from raydiff.models.feature_map import (
    add_channels_last,
    add_maps,
    double_channels_last,
    enlarge_nearest,
)
from raydiff.models.geglu import geglu, geglu_contiguous
from raydiff.models.group_norm import group_norm_channels_last, group_norm_silu
from raydiff.models.layer_norm import add_layer_norm, add_layer_norm_rows, layer_norm_rows
from raydiff.models.resnet import ResnetBlock

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

# Inductor warns about the build and the card it finds.
inductor_may_warn = pytest.mark.filterwarnings("default")

TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
MAPS = [  # (B, C, H, W), groups
    ((2, 320, 128, 128), 32),  # 10 channels a group
    ((2, 640, 64, 64), 32),
    ((16, 960, 64, 64), 32),
    ((2, 1280, 32, 32), 32),
    ((3, 1920, 13, 9), 32),  # 60 channels a group, 117 pixels
    ((1, 2560, 17, 20), 32),
    ((2, 1152, 24, 24), 32),  # the refiner's 36
    ((1, 128, 511, 513), 32),  # more tiles than slices
    ((5, 96, 7, 5), 8),
    ((2, 40, 1, 3), 4),
    ((3, 64, 1, 1), 32),
    ((2, 33, 19, 23), 3),  # channel count not a multiple of anything
    ((1, 8, 65, 2), 8),  # one channel a group
]


class Calls(TorchDispatchMode):
    """Names of our own operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "raydiff":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def random_map(shape, dtype, *, seed=0):
    """A channels_last map whose channels have means of their own, and its weight, bias, shift."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, device="cuda")

    rows, channels = shape[:2]
    x = normal(*shape) * 1.5 + 2 * normal(1, channels, 1, 1)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (1 + 0.3 * normal(channels)).to(dtype)
    bias = normal(channels).to(dtype)
    shift = normal(rows, 3 * channels).to(dtype)[:, channels : 2 * channels]  # strided rows
    return x, weight, bias, shift


def assert_normalised(actual, x, groups, weight, bias, *, silu, shift=None):
    """Near the composition in float64, as far as a group's condition allows.

    Rounding x in float32 moves (x - mean) / std by |x| / std units: much where the few values of a
    group happen to be alike. Eight roundings lie between x and the result.
    """
    expected = composition(x, groups, weight, bias, silu=silu, shift=shift)
    shifted = x.double() if shift is None else x.double() + shift.double()[..., None, None]
    values = shifted.unflatten(1, (groups, -1)).flatten(2)  # (B, G, C / G * P)
    std = (values.var(dim=2, correction=0) + 1e-5).sqrt()
    condition = (values.abs().amax(2) / std).repeat_interleave(x.shape[1] // groups, dim=1)
    slack = 8 * torch.finfo(torch.float32).eps * condition * weight.double().abs()
    bound = TOLERANCES[x.dtype] * (1 + expected.abs()) + slack[:, :, None, None]
    excess = ((actual.double() - expected).abs() - bound).max().item()
    assert excess <= 0, f"off by {excess:.2e} more than the bound"


def composition(x, groups, weight, bias, *, silu, shift=None):
    x = x.double()
    if shift is not None:
        x = x + shift.double()[..., None, None]
    y = F.group_norm(x, groups, weight.double(), bias.double(), 1e-5)
    return F.silu(y) if silu else y


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize(("shape", "groups"), MAPS, ids=lambda value: str(value))
@pytest.mark.parametrize(("silu", "shifted"), [(True, True), (True, False), (False, False)])
def test_group_norm_equals_the_composition(shape, groups, dtype, silu, shifted):
    x, weight, bias, shift = random_map(shape, dtype)
    shift = shift if shifted else None
    with torch.inference_mode(), Calls() as calls:
        actual = group_norm_silu(x, groups, weight, bias, 1e-5, silu=silu, shift=shift)
    assert calls.names == ["group_norm"]
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert_normalised(actual, x, groups, weight, bias, silu=silu, shift=shift)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_group_norm_takes_one_shift_for_all_rows(dtype):
    x, weight, bias, shift = random_map((3, 96, 17, 20), dtype)
    with torch.inference_mode():
        actual = group_norm_silu(x, 32, weight, bias, 1e-5, shift=shift[0])
        rows = group_norm_silu(x, 32, weight, bias, 1e-5, shift=shift[:1].expand(3, -1))
    assert torch.equal(actual, rows)
    assert_normalised(actual, x, 32, weight, bias, silu=True, shift=shift[0])


def test_group_norm_survives_a_large_mean():
    """Statistics from E[x^2] - E[x]^2 would lose every digit here."""
    x, weight, bias, _ = random_map((2, 320, 64, 64), torch.float32)
    x = x + 3000
    x[0, :, 0, 0] += 500  # an outlier where a slice of the pixels begins
    with torch.inference_mode():
        actual = group_norm_silu(x, 32, weight, bias, 1e-5)
    expected = composition(x, 32, weight, bias, silu=True)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-3, atol=2e-3)


def test_group_norm_of_a_row_does_not_depend_on_the_batch():
    x, weight, bias, shift = random_map((7, 640, 48, 40), torch.bfloat16)
    with torch.inference_mode():
        together = group_norm_silu(x, 32, weight, bias, 1e-5, shift=shift)
        for row in (0, 3, 6):
            one = x[row : row + 1].contiguous(memory_format=torch.channels_last)
            alone = group_norm_silu(one, 32, weight, bias, 1e-5, shift=shift[row : row + 1])
            assert torch.equal(together[row : row + 1], alone)


def test_group_norm_beyond_two_to_the_31_elements():
    shape = (9, 320, 896, 864)
    assert torch.Size(shape).numel() > 2**31
    x, weight, bias, _ = random_map((1, *shape[1:]), torch.bfloat16)
    with torch.inference_mode():
        alone = group_norm_silu(x, 32, weight, bias, 1e-5)
        many = x.expand(shape).contiguous(memory_format=torch.channels_last)
        last = group_norm_silu(many, 32, weight, bias, 1e-5)[-1:]
    assert torch.equal(last, alone)


def test_other_inputs_take_the_composition():
    x, weight, bias, _ = random_map((2, 64, 8, 8), torch.float32)
    weight.requires_grad_()
    with Calls() as calls:
        group_norm_silu(x, 32, weight, bias, 1e-5).sum().backward()
    assert "group_norm" not in calls.names
    assert weight.grad.abs().sum() > 0
    with torch.inference_mode(), Calls() as calls:
        group_norm_silu(x.contiguous(), 32, weight, bias, 1e-5)
        group_norm_silu(x.double(), 32, weight.double(), bias.double(), 1e-5)
    assert "group_norm" not in calls.names


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 4096, 5120), (16, 1024, 10240), (3, 117, 2560), (1, 1, 1026), (5, 14), (2, 7, 3, 100)],
)
def test_geglu_equals_the_composition(shape, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    x = (3 * torch.randn(shape, generator=generator, device="cuda")).to(dtype)
    with torch.inference_mode(), Calls() as calls:
        actual = geglu(x)
    assert calls.names == ["geglu"]
    value, gate = x.double().chunk(2, dim=-1)
    tolerance = TOLERANCES[dtype]
    expected = value * F.gelu(gate)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_geglu_has_the_exact_gelu_in_both_tails(dtype):
    gate = torch.linspace(-14, 14, 4001, dtype=torch.float64, device="cuda").to(dtype)
    with torch.inference_mode():
        actual = geglu(torch.stack([torch.ones_like(gate), gate], dim=-1)).squeeze(-1).double()
    gate = gate.double()
    expected = 0.5 * gate * torch.special.erfc(-gate / 2**0.5)
    relative = 4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    smallest = max(torch.finfo(dtype).smallest_normal, 1e-12)  # past 7 deviations
    assert ((actual - expected).abs() <= relative * expected.abs() + smallest).all()
    assert torch.isnan(geglu(torch.tensor([[1.0, float("nan")]], device="cuda", dtype=dtype)))


ROWS = [(16, 1024, 1280), (2, 4096, 640), (3, 117, 320), (1, 5, 33), (7, 1536), (2, 3, 5000)]


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("kind", ["sum", "strided_sum", "alone"])
def test_add_layer_norm_equals_the_composition(shape, dtype, kind):
    generator = torch.Generator("cuda").manual_seed(0)
    channels = shape[-1]

    def normal(*size):
        return torch.randn(size, generator=generator, device="cuda").to(dtype)

    x, delta = 3 + 2 * normal(*shape), normal(*shape)
    if kind == "strided_sum":
        x, delta = (3 + 2 * normal(*shape[:-1], 3 * channels)).chunk(3, dim=-1)[1:]
    if kind == "alone":
        delta = None
    weight, bias = 1 + 0.3 * normal(channels), normal(channels)
    with torch.inference_mode(), Calls() as calls:
        total, normed = add_layer_norm(x, delta, weight, bias, 1e-5)
    assert calls.names == ["layer_norm" if delta is None else "add_layer_norm"]
    assert normed.is_contiguous()
    assert torch.equal(total, x if delta is None else x + delta)
    expected = F.layer_norm(total.double(), (channels,), weight.double(), bias.double(), 1e-5)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(normed.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("shape", [(2, 512, 64, 64), (3, 40, 1, 70), (1, 33, 19, 23)], ids=str)
def test_maps_add_and_double_as_the_composition(shape, dtype):
    x, _, bias, _ = random_map(shape, dtype)
    y, *_ = random_map(shape, dtype, seed=1)
    with torch.inference_mode(), Calls() as calls:
        total = add_maps(x, y, bias)
        doubled = enlarge_nearest(x, (2 * shape[2], 2 * shape[3]))
    assert calls.names == ["add_maps", "double_nearest"]
    expected = x.double() + y.double() + bias.double()[:, None, None]
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(total.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(doubled, F.interpolate(x, scale_factor=2.0))
    for out in (total, doubled):
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_operators_are_registered_as_torch_library_asks():
    x, weight, bias, shift = random_map((2, 40, 5, 7), torch.float32)
    checks = ("test_schema", "test_faketensor")
    for given in (shift, None):
        arguments = (x, given, weight, bias, 4, 1e-5, True)
        torch.library.opcheck(group_norm_channels_last, arguments, test_utils=checks)
    geglu_input = torch.randn(3, 5, 64, device="cuda")
    torch.library.opcheck(geglu_contiguous, (geglu_input,), test_utils=checks)
    rows, weight = torch.randn(3, 5, 3 * 64, device="cuda")[..., 64:128], torch.ones(64).cuda()
    torch.library.opcheck(layer_norm_rows, (rows, weight, weight, 1e-5), test_utils=checks)
    arguments = (rows, geglu_input, weight, weight, 1e-5)
    torch.library.opcheck(add_layer_norm_rows, arguments, test_utils=checks)
    torch.library.opcheck(add_channels_last, (x, x, bias), test_utils=checks)
    torch.library.opcheck(double_channels_last, (x,), test_utils=checks)


@inductor_may_warn
def test_operators_compile():
    x, weight, bias, shift = random_map((2, 64, 12, 12), torch.bfloat16)

    @torch.compile(fullgraph=True)
    def normalise(x, shift):
        y = group_norm_channels_last(x, shift, weight, bias, 32, 1e-5, True)
        return geglu_contiguous(y.permute(0, 2, 3, 1).flatten(1, 2)) + 1

    with torch.inference_mode():
        actual = normalise(x, shift)
    y = composition(x, 32, weight, bias, silu=True, shift=shift)
    value, gate = y.permute(0, 2, 3, 1).flatten(1, 2).chunk(2, dim=-1)
    torch.testing.assert_close(actual.double(), value * F.gelu(gate) + 1, rtol=3e-2, atol=3e-2)


def random_blocks():
    """A resnet with a shortcut, one without, and a transformer, as the UNet has them."""
    torch.manual_seed(0)
    resnets = [ResnetBlock(width, 320, 256, num_groups=32, eps=1e-5) for width in (160, 320)]
    transformer = SpatialTransformer(
        320,
        num_heads=5,
        num_layers=2,
        cross_attention_dim=96,
        num_groups=32,
        use_linear_projection=True,
    )
    blocks = torch.nn.ModuleList([*resnets, transformer]).requires_grad_(False)
    return blocks, torch.randn(2, 160, 15, 11), torch.randn(2, 256), torch.randn(2, 77, 96)


def run_blocks(blocks, x, time, prompt):
    first, second, transformer = blocks
    keys_values = [layer.attn2.keys_values(prompt) for layer in transformer.transformer_blocks]
    return transformer(second(first(x, time), time), iter(keys_values))


@inductor_may_warn
@pytest.mark.parametrize("is_compiled", [False, True])
def test_blocks_on_the_gpu_equal_the_cpu(is_compiled):
    blocks, x, time, prompt = random_blocks()
    with torch.inference_mode():
        expected = run_blocks(blocks, x, time, prompt)
        blocks.to("cuda", memory_format=torch.channels_last)
        for resnet in blocks[:2]:
            resnet.fold_biases()
        x = x.cuda().contiguous(memory_format=torch.channels_last)
        run = torch.compile(run_blocks, fullgraph=True) if is_compiled else run_blocks
        actual = run(blocks, x, time.cuda(), prompt.cuda())
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert (actual.cpu() - expected).norm() / expected.norm() < 2e-3  # convolutions run in TF32


@inductor_may_warn
def test_compiled_blocks_run_the_kernels_and_copy_no_map():
    blocks, x, time, prompt = random_blocks()
    blocks.to("cuda", torch.bfloat16, memory_format=torch.channels_last)
    for resnet in blocks[:2]:
        resnet.fold_biases()
    x = x.cuda().bfloat16().contiguous(memory_format=torch.channels_last)
    time, prompt = time.cuda().bfloat16(), prompt.cuda().bfloat16()
    with torch.inference_mode():
        compiled = torch.compile(run_blocks, fullgraph=True, dynamic=False)
        expected = run_blocks(blocks, x, time, prompt)
        actual, (code,) = run_and_get_code(compiled, blocks, x, time, prompt)
    assert (actual - expected).norm() / expected.norm() < 2e-2
    called = re.findall(r"torch\.ops\.raydiff\.(\w+)\.default\(", code)
    assert Counter(called) == {
        "group_norm": 5,
        "add_maps": 1,
        "layer_norm": 1,
        "add_layer_norm": 5,
        "geglu": 2,
    }
    # What Inductor itself generates; a change of a map's layout would show as a clone.
    generated = set(re.findall(r"triton_\w*fused_\w+", code))
    assert not [name for name in generated if re.search("clone|_norm|gelu", name)], generated
