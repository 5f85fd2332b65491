"""Tiled against whole. Errors are in units of the whole result's standard deviation, on random
weights, with which a network is far less smooth than a trained one; diffusers is the yardstick.
"""

import diffusers
import pytest
import torch
import torch.nn.functional as F

from raydiff.errors import ConfigError
from raydiff.models.ltx2.video_tiling import tiled_decode, tiled_encode
from raydiff.models.ltx2.video_vae import LTX2VideoVAE
from raydiff.models.ltx2.video_vae_config import LTX2VideoVAEConfig

SMALL_20 = {
    "latent_channels": 8,
    "block_out_channels": [8, 16, 32, 32],
    "layers_per_block": [1, 1, 1, 1, 1],
    "decoder_block_out_channels": [8, 16, 32],
    "decoder_layers_per_block": [1, 1, 1, 2],
    "decoder_causal": False,
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
SMALL_23 = {
    **SMALL_20,
    "decoder_block_out_channels": [8, 16, 16, 32],
    "decoder_layers_per_block": [1, 1, 1, 1, 2],
    "decoder_spatio_temporal_scaling": [True] * 4,
    "decoder_inject_noise": [False] * 5,
    "upsample_type": ["spatiotemporal", "spatiotemporal", "temporal", "spatial"],
    "upsample_factor": [2, 2, 1, 2],
    "upsample_residual": [False] * 4,
    "decoder_spatial_padding_mode": "zeros",
}


@torch.no_grad()
def models(config, seed):
    """diffusers' model and ours with the same random parameters."""
    reference = diffusers.AutoencoderKLLTX2Video(**config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in reference.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.3 * noise)
    ours = LTX2VideoVAE(LTX2VideoVAEConfig.from_dict(dict(reference.config)))
    ours.load_state_dict(reference.state_dict())
    return reference, ours


def smooth_noise(channels, num_frames, height, width, seed):
    """Random latents or pixels in which neighbours are alike, as in videos."""
    generator = torch.Generator().manual_seed(seed)
    size = (num_frames, height, width)
    coarse = [length // 4 + 1 for length in size]
    return F.interpolate(
        torch.randn(1, channels, *coarse, generator=generator), size=size, mode="trilinear"
    ) + 0.5 * torch.randn(1, channels, *size, generator=generator)


def errors(out, whole):
    """Relative error, largest error, and largest step of the error from pixel to pixel."""
    error = (out - whole) / whole.std()
    steps = max(error.diff(dim=dim).abs().max().item() for dim in (3, 4))
    return error.square().mean().sqrt().item(), error.abs().max().item(), steps


def side_by_side(run, clip, tile):
    """Tiles that neither overlap nor know of each other."""
    rows = [
        torch.cat([run(part) for part in row.split(tile, dim=4)], dim=4)
        for row in clip.split(tile, dim=3)
    ]
    return torch.cat(rows, dim=3)


def decode(vae, latents, **options):
    return torch.cat(list(tiled_decode(vae, latents, **options)), dim=2)


@pytest.mark.parametrize("config", [SMALL_20, SMALL_23], ids=["2.0", "2.3"])
@torch.no_grad()
def test_decode_seams_are_bounded(config):
    reference, vae = models(config, seed=0)
    latents = smooth_noise(8, 1, 8, 10, seed=0)
    whole = vae.decode(latents)
    tiled = decode(vae, latents, tile_size=192, overlap=128, num_frames=8)
    assert tiled.shape == whole.shape
    ours = errors(tiled, whole)
    bounds = (0.2, 2.0, 3.0)
    assert all(value <= bound for value, bound in zip(ours, bounds, strict=True)), ours
    unblended = errors(side_by_side(vae.decode, latents, 5), whole)
    assert all(value > 1.5 * bound for value, bound in zip(unblended, bounds, strict=True)), (
        unblended
    )
    reference.enable_tiling(192, 192, None, 64, 64, None)
    theirs = errors(reference.tiled_decode(latents, None).sample, whole)
    assert ours[0] <= 0.75 * theirs[0], (ours, theirs)


@torch.no_grad()
def test_encode_seams_are_bounded():
    reference, vae = models(SMALL_20, seed=0)
    pixels = smooth_noise(3, 1, 256, 320, seed=0) / 3
    whole = vae.encode(pixels)
    tiled = tiled_encode(vae, pixels, tile_size=192, overlap=128, num_frames=8)
    assert tiled.mean.shape == tiled.logvar.shape == whole.mean.shape
    ours = errors(tiled.mean, whole.mean)
    bounds = (0.1, 0.5, 0.6)
    assert all(value <= bound for value, bound in zip(ours, bounds, strict=True)), ours
    assert errors(tiled.logvar, whole.logvar)[0] <= 2 * bounds[0]
    unblended = errors(side_by_side(lambda part: vae.encode(part).mean, pixels, 160), whole.mean)
    assert all(value > 3 * bound for value, bound in zip(unblended, bounds, strict=True)), unblended
    reference.enable_tiling(192, 192, None, 64, 64, None)
    theirs = errors(reference.tiled_encode(pixels)[:, :8], whole.mean)
    assert ours[0] <= 0.6 * theirs[0], (ours, theirs)


@pytest.mark.parametrize("config", [SMALL_20, SMALL_23], ids=["2.0", "2.3"])
@torch.no_grad()
def test_there_are_no_seams_in_time(config):
    """Where diffusers blends chunks that do not know of each other, ours are the whole."""
    reference, vae = models(config, seed=2)
    latents = smooth_noise(8, 9, 2, 2, seed=3)
    whole = vae.decode(latents)
    in_chunks = decode(vae, latents, tile_size=64, overlap=0, num_frames=16)
    assert errors(in_chunks, whole)[0] <= 1e-5
    assert errors(reference._temporal_tiled_decode(latents, None).sample, whole)[0] > 0.1


@torch.no_grad()
def test_tiles_and_chunks_together_are_the_tiles_of_the_whole_clip():
    _, vae = models(SMALL_20, seed=4)
    latents = smooth_noise(8, 4, 3, 5, seed=5)
    tiles = {"tile_size": 96, "overlap": 32}
    in_chunks = decode(vae, latents, **tiles, num_frames=8)
    assert errors(in_chunks, decode(vae, latents, **tiles, num_frames=24))[0] <= 1e-5
    pixels = smooth_noise(3, 25, 64, 128, seed=6)
    in_chunks = tiled_encode(vae, pixels, tile_size=64, overlap=32, num_frames=8)
    at_once = tiled_encode(vae, pixels, tile_size=64, overlap=32, num_frames=24)
    assert errors(in_chunks.mean, at_once.mean)[0] <= 1e-5
    assert errors(in_chunks.logvar, at_once.logvar)[0] <= 1e-5


@torch.no_grad()
def test_one_tile_and_one_chunk_are_the_whole():
    _, vae = models(SMALL_20, seed=7)
    latents = smooth_noise(8, 2, 2, 3, seed=8)
    (out,) = tiled_decode(vae, latents, tile_size=96, overlap=32, num_frames=8)
    assert torch.equal(out, vae.decode(latents))
    pixels = smooth_noise(3, 9, 64, 96, seed=9)
    tiled = tiled_encode(vae, pixels, tile_size=96, overlap=32, num_frames=8)
    assert torch.equal(tiled.mean, vae.encode(pixels).mean)


@torch.no_grad()
def test_convolutions_see_one_tile_and_one_chunk():
    _, vae = models(SMALL_20, seed=10)
    seen = []
    vae.decoder.conv_out.conv.register_forward_hook(
        lambda _module, args, _output: seen.append(args[0].shape[2:])
    )
    latents = smooth_noise(8, 5, 3, 4, seed=11)
    parts = list(tiled_decode(vae, latents, tile_size=96, overlap=32, num_frames=8))
    assert sum(part.shape[2] for part in parts) == 33
    assert max(shape[0] for shape in seen) <= 16 + 2
    # Patches of 4 pixels, and the mirrored edges.
    assert {tuple(shape[1:]) for shape in seen} == {(96 // 4 + 2, 96 // 4 + 2)}


@torch.no_grad()
def test_bfloat16_stays_near_float32():
    _, vae = models(SMALL_20, seed=12)
    latents = smooth_noise(8, 2, 3, 5, seed=13)
    options = {"tile_size": 96, "overlap": 32, "num_frames": 8}
    exact = decode(vae, latents, **options)
    rounded = decode(vae.bfloat16(), latents, **options)
    assert rounded.dtype == torch.bfloat16
    assert errors(rounded.float(), exact)[0] <= 0.05


@pytest.mark.parametrize(
    ("tile_size", "overlap", "num_frames", "message"),
    [
        (100, 32, 8, "tile_size is 100; this autoencoder needs a multiple of 32. Use 96 or 128"),
        (96, 96, 8, "overlap is 96 and tile_size 96"),
        (96, 32, 12, "num_frames of a chunk is 12; .* a multiple of 8. Use 16"),
        (96, 32, 0, "num_frames of a chunk is 0; .* Use 8"),
    ],
)
def test_refuses_tiles_and_chunks_that_do_not_fit_the_grid(tile_size, overlap, num_frames, message):
    _, vae = models(SMALL_20, seed=14)
    with pytest.raises(ConfigError, match=message):
        tiled_decode(
            vae,
            torch.zeros(1, 8, 2, 5, 5),
            tile_size=tile_size,
            overlap=overlap,
            num_frames=num_frames,
        )
