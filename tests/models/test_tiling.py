"""Tiled against whole. Errors are in units of the whole result's standard deviation, on random
weights, with which a network is far less smooth than a trained one; diffusers is the yardstick.
"""

from itertools import pairwise

import diffusers
import pytest
import torch
import torch.nn.functional as F

from raydiff.errors import ConfigError
from raydiff.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from raydiff.models.tiling import _core, _spans, shares, tiled_decode, tiled_encode

BLOCKS = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 48, 64],
    "norm_num_groups": 8,
    "layers_per_block": 1,
}
SD = {**BLOCKS, "latent_channels": 4}
FLUX = {**BLOCKS, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}

# tile and overlap in pixels, then the latents' size: odd, exact and narrower than a tile
CASES = [(96, 32, (27, 33)), (96, 32, (24, 36)), (128, 32, (13, 45))]


@torch.no_grad()
def models(config, seed):
    """diffusers' model and ours with the same random parameters, norms and biases included."""
    reference = diffusers.AutoencoderKL(**config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in reference.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.3 * noise + ("norm" in name and name.endswith("weight")))
    ours = AutoencoderKL(AutoencoderKLConfig.from_dict(dict(reference.config)))
    ours.load_state_dict(reference.state_dict())
    return reference, ours


def smooth_noise(channels, height, width, seed, batch=1):
    """Random latents or pixels in which neighbours are alike, as in images."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, channels, height // 4 + 1, width // 4 + 1, generator=generator)
    fine = torch.randn(batch, channels, height, width, generator=generator)
    return F.interpolate(coarse, size=(height, width), mode="bicubic") + 0.5 * fine


def errors(out, whole):
    """Relative error, largest error, and largest step of the error from pixel to pixel."""
    scale = whole.std()
    error = (out - whole) / scale
    steps = max(error.diff(dim=2).abs().max().item(), error.diff(dim=3).abs().max().item())
    relative = error.square().mean().sqrt().item()
    return relative, error.abs().max().item(), steps


def use_tiles(reference, tile_size, overlap):
    reference.tile_sample_min_size = tile_size
    reference.tile_latent_min_size = tile_size // 8
    reference.tile_overlap_factor = overlap / tile_size
    return reference


def side_by_side(run, image, tile):
    """Tiles that neither overlap nor know of each other."""
    rows = []
    for top in range(0, image.shape[2], tile):
        parts = image[:, :, top : top + tile].split(tile, dim=3)
        rows.append(torch.cat([run(part) for part in parts], dim=3))
    return torch.cat(rows, dim=2)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("tile_size", "overlap", "size"), CASES)
@pytest.mark.parametrize("config", [SD, FLUX], ids=["sd", "flux"])
@torch.no_grad()
def test_decode_seams_are_bounded(config, tile_size, overlap, size, seed):
    reference, vae = models(config, seed)
    latents = smooth_noise(config["latent_channels"], *size, seed)
    whole = vae.decode(latents)
    tiled = tiled_decode(vae, latents, tile_size=tile_size, overlap=overlap)
    assert tiled.shape == whole.shape
    assert tiled.dtype == whole.dtype
    ours = errors(tiled, whole)
    bounds = (0.2, 1.3, 0.6)
    assert all(value <= bound for value, bound in zip(ours, bounds, strict=True)), ours
    unblended = errors(side_by_side(vae.decode, latents, tile_size // 8), whole)
    assert all(value > bound for value, bound in zip(unblended, bounds, strict=True)), unblended
    theirs = errors(use_tiles(reference, tile_size, overlap).tiled_decode(latents).sample, whole)
    assert all(our <= their / 2 for our, their in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("tile_size", "overlap", "size"), CASES)
@torch.no_grad()
def test_encode_seams_are_bounded(tile_size, overlap, size, seed):
    reference, vae = models(FLUX, seed)
    pixels = smooth_noise(3, size[0] * 8, size[1] * 8, seed) / 3
    whole = vae.encode(pixels)
    tiled = tiled_encode(vae, pixels, tile_size=tile_size, overlap=overlap)
    ours = errors(tiled.mean, whole.mean)
    bounds = (0.2, 1.5, 2.0)
    assert all(value <= bound for value, bound in zip(ours, bounds, strict=True)), ours
    assert errors(tiled.logvar, whole.logvar)[0] <= bounds[0]
    unblended = side_by_side(lambda part: vae.encode(part).mean, pixels, tile_size)
    assert all(v > b for v, b in zip(errors(unblended, whole.mean), bounds, strict=True))
    theirs = use_tiles(reference, tile_size, overlap)._tiled_encode(pixels).chunk(2, dim=1)[0]
    assert ours[0] <= 0.7 * errors(theirs, whole.mean)[0]


@torch.no_grad()
def test_encode_takes_any_size():
    _, vae = models(SD, 2)
    for height, width in ((203, 101), (97, 250), (103, 96)):
        pixels = smooth_noise(3, height, width, 3) / 3
        whole = vae.encode(pixels)
        tiled = tiled_encode(vae, pixels, tile_size=96, overlap=32)
        assert tiled.mean.shape == tiled.logvar.shape == whole.mean.shape
        assert errors(tiled.mean, whole.mean)[0] <= 0.2
        assert errors(tiled.logvar, whole.logvar)[0] <= 0.2


@torch.no_grad()
def test_one_tile_is_the_whole():
    _, vae = models(SD, 3)
    latents = smooth_noise(4, 7, 12, 4, batch=2)
    assert torch.equal(tiled_decode(vae, latents, tile_size=96, overlap=32), vae.decode(latents))
    pixels = smooth_noise(3, 61, 102, 5, batch=2)
    tiled, whole = tiled_encode(vae, pixels, tile_size=96, overlap=0), vae.encode(pixels)
    assert torch.equal(tiled.mean, whole.mean)
    assert torch.equal(tiled.logvar, whole.logvar)


@torch.no_grad()
def test_convolutions_see_one_tile_of_one_image():
    _, vae = models(SD, 4)
    seen = []
    for part in (vae.encoder.conv_in, vae.decoder.conv_norm_out):
        part.register_forward_hook(lambda _module, args, _output: seen.append(args[0].shape))
    latents = smooth_noise(4, 19, 30, 6, batch=2)
    pixels = tiled_decode(vae, latents, tile_size=96, overlap=16)
    assert {(shape[0], *shape[2:]) for shape in seen} == {(1, 88, 96)}
    seen.clear()
    tiled_encode(vae, pixels[:, :, :-3], tile_size=96, overlap=16)
    assert {(shape[0], shape[3]) for shape in seen} == {(1, 96)}
    assert {shape[2] for shape in seen} == {80, 85}


@torch.no_grad()
def test_images_of_a_batch_do_not_mix():
    _, vae = models(SD, 5)
    latents = smooth_noise(4, 14, 20, 7, batch=3)
    together = tiled_decode(vae, latents, tile_size=96, overlap=32)
    alone = [tiled_decode(vae, image, tile_size=96, overlap=32) for image in latents.split(1)]
    torch.testing.assert_close(together, torch.cat(alone))


@torch.no_grad()
def test_prepared_channels_last_gives_the_same_tiles():
    _, vae = models(SD, 6)
    latents = smooth_noise(4, 14, 20, 8)
    before = tiled_decode(vae, latents, tile_size=96, overlap=32)
    vae.prepare_for_inference(channels_last=True)
    after = tiled_decode(vae, latents, tile_size=96, overlap=32)
    assert errors(after, before)[0] <= 1e-5


@torch.no_grad()
def test_bfloat16_stays_near_float32():
    _, vae = models(SD, 7)
    latents = smooth_noise(4, 14, 20, 9)
    exact = tiled_decode(vae, latents, tile_size=96, overlap=32)
    rounded = tiled_decode(vae.bfloat16(), latents, tile_size=96, overlap=32)
    assert rounded.dtype == torch.bfloat16
    assert errors(rounded.float(), exact)[0] <= 0.05


@torch.no_grad()
def test_the_model_is_left_as_it_was():
    _, vae = models(SD, 8)
    latents = smooth_noise(4, 14, 20, 10)
    before = vae.decode(latents)
    tiled_decode(vae, latents, tile_size=96, overlap=32)
    failing = vae.decoder.conv_norm_out.register_forward_hook(lambda *_args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiled_decode(vae, latents, tile_size=96, overlap=32)
    failing.remove()
    assert not any(module._forward_hooks for module in vae.modules())
    assert torch.equal(vae.decode(latents), before)


@pytest.mark.parametrize("tile", [1, 2, 5, 16])
@pytest.mark.parametrize("scale", [1, 8])
def test_shares_add_up_and_cores_part_the_image(tile, scale):
    for overlap in range(tile):
        for size in range(1, 70):
            spans = _spans(size, tile, overlap)
            assert (spans[0].start, spans[-1].stop) == (0, size)
            (length,) = {span.stop - span.start for span in spans}
            assert length <= min(size, tile)
            assert all(a.stop - b.start >= overlap for a, b in pairwise(spans))
            total = torch.zeros(size * scale)
            cores = torch.zeros(size * scale * 2, dtype=torch.int64)
            for span in spans:
                weights = shares(span, scale, torch.device("cpu"))
                assert weights.min() >= 0
                total[span.start * scale : span.stop * scale] += weights
                pixels = length * scale * 2
                cores[span.start * scale * 2 :][:pixels][_core(span, pixels)] += 1
            torch.testing.assert_close(total, torch.ones_like(total))
            assert torch.equal(cores, torch.ones_like(cores))


@pytest.mark.parametrize(
    ("tile_size", "overlap", "message"),
    [
        (100, 32, "tile_size is 100; this autoencoder needs a multiple of 8. Use 96 or 104"),
        (96, 20, "overlap is 20; this autoencoder needs a multiple of 8. Use 16 or 24"),
        (96, 96, "overlap is 96 and tile_size 96"),
        (96, -8, "overlap is -8 and tile_size 96"),
    ],
)
def test_refuses_tiles_that_do_not_fit_the_grid(tile_size, overlap, message):
    _, vae = models(SD, 9)
    with pytest.raises(ConfigError, match=message):
        tiled_decode(vae, torch.zeros(1, 4, 20, 20), tile_size=tile_size, overlap=overlap)
