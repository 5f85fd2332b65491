"""The full-size SDXL autoencoder in bfloat16 at 1024x1024; prints time and memory (`-s`)."""

import math

import pytest
import torch

from raydiff.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig, attend
from raydiff.models.tiling import tiled_decode, tiled_encode
from tests.relative_error import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

MIB = 2**20
NUM_ROUNDINGS = 2 * 70
"""Results that bfloat16 rounds on the longest way through the decoder: about 70 layers, each a
normalisation or convolution, and the residual sums."""
BF16_BOUND = 2.5 * math.sqrt(NUM_ROUNDINGS) * 2**-9
"""Independent roundings of half a unit in the last place (2**-9) add up as a random walk: 0.023.
Weights are the same in both runs; the factor leaves room for layers that amplify."""


@torch.no_grad()
def build(seed=0):
    """The SDXL autoencoder with every parameter random, bfloat16 values held in float32."""
    with torch.device("meta"):
        vae = AutoencoderKL(AutoencoderKLConfig(scaling_factor=0.13025))
    vae.to_empty(device="cuda")
    generator = torch.Generator("cuda").manual_seed(seed)
    for name, parameter in vae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, device="cuda")
        if parameter.ndim > 1:
            noise /= parameter[0].numel() ** 0.5
        else:
            noise = 0.3 * noise + ("norm" in name and name.endswith("weight"))
        parameter.copy_(noise.bfloat16())
    return vae


def latents_of(batch, size=128, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, size, size, generator=generator).cuda()


def measure(label, run):
    """Run twice; print the second run's time and the memory it took beyond what was there."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    out = run()
    stop.record()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    print(f"{label}: {start.elapsed_time(stop):.1f} ms, peak {peak / MIB:.0f} MiB")
    return out, peak


@torch.no_grad()
def test_bfloat16_decode_is_near_float32_and_tiles_save_memory():
    vae = build()
    latents = latents_of(1)
    exact, _ = measure("decode 1024 float32", lambda: vae.decode(latents))
    vae.bfloat16()
    plain, _ = measure("decode 1024 bfloat16", lambda: vae.decode(latents))
    vae.prepare_for_inference(channels_last=True)
    fast, whole_peak = measure("decode 1024 bfloat16 channels_last", lambda: vae.decode(latents))
    for out in (plain, fast):
        assert out.isfinite().all()
        assert relative_error(out, exact) <= BF16_BOUND
    tiled, tiled_peak = measure(
        "decode 1024 bfloat16 in tiles of 512",
        lambda: tiled_decode(vae, latents, tile_size=512, overlap=64),
    )
    error = relative_error(tiled, fast)
    print(
        f"bfloat16 to float32 {relative_error(fast, exact):.4f} (bound {BF16_BOUND:.4f}), "
        f"tiled to whole {error:.4f}"
    )
    assert error <= 0.2
    assert tiled_peak <= 0.5 * whole_peak


@torch.no_grad()
def test_bfloat16_encode_is_near_float32():
    vae = build(seed=2)
    pixels = torch.rand(1, 3, 1016, 1024, generator=torch.Generator().manual_seed(3)).cuda() * 2 - 1
    exact = vae.encode(pixels)
    vae.bfloat16()
    vae.prepare_for_inference(channels_last=True)
    rounded, whole_peak = measure("encode 1016x1024 bfloat16", lambda: vae.encode(pixels))
    assert relative_error(rounded.mean, exact.mean) <= BF16_BOUND
    assert relative_error(rounded.logvar, exact.logvar) <= BF16_BOUND
    tiled, tiled_peak = measure(
        "encode 1016x1024 in tiles of 512",
        lambda: tiled_encode(vae, pixels, tile_size=512, overlap=64),
    )
    assert relative_error(tiled.mean, rounded.mean) <= 0.2
    assert tiled_peak <= 0.6 * whole_peak


@torch.no_grad()
def test_more_than_two_billion_elements():
    """Nine maps of 256x1024x1024 pass 2**31 elements, where 32-bit offsets wrap round."""
    vae = build(seed=4).bfloat16()
    vae.prepare_for_inference(channels_last=True)
    latents = latents_of(9, seed=5)
    together, _ = measure("decode nine of 1024", lambda: vae.decode(latents))
    for index in (0, 8):
        alone = vae.decode(latents[index : index + 1])
        assert relative_error(together[index : index + 1], alone) <= BF16_BOUND


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_attention_512_wide_holds_no_score_matrix(dtype):
    """A matrix of 16384 x 16384 scores alone is 512 MiB in bfloat16."""
    generator = torch.Generator("cuda").manual_seed(6)
    qkv = torch.randn(1, 1, 16384, 3 * 512, generator=generator, device="cuda", dtype=dtype)
    query, key, value = qkv.chunk(3, dim=-1)
    whole, peak = measure(f"attention of 16384, {dtype}", lambda: attend(query, key, value))
    assert peak <= 256 * MIB
    sliced = attend(query, key, value, max_scores=2**26)
    assert relative_error(sliced, whole) <= 1e-2
    rows = slice(5000, 5064)
    scores = query[:, :, rows].float() @ key.float().mT / math.sqrt(512)
    expected = scores.softmax(-1) @ value.float()
    assert relative_error(whole[:, :, rows], expected) <= 1e-2
