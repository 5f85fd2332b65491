"""LTX-2's video VAE against diffusers' at fp32, on random weights, statistics and inputs."""

import diffusers
import pytest
import torch

from raydiff.models.autoencoder_kl import sample
from raydiff.models.ltx2.video_vae import LTX2VideoVAE
from raydiff.models.ltx2.video_vae_config import LTX2VideoVAEConfig
from tests.parity.reference_weights import with_random_weights, with_weights_of
from tests.relative_error import relative_error

RATIOS = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
LAYOUT_23 = {
    "decoder_causal": False,
    "decoder_spatio_temporal_scaling": [True] * 4,
    "decoder_inject_noise": [False] * 5,
    "upsample_type": ["spatiotemporal", "spatiotemporal", "temporal", "spatial"],
    "upsample_residual": [False] * 4,
    "upsample_factor": [2, 2, 1, 2],
    "decoder_spatial_padding_mode": "zeros",
    **RATIOS,
}
FULL_SIZE = {
    "2.0": {"decoder_causal": False, **RATIOS},
    "2.3": {
        **LAYOUT_23,
        "block_out_channels": [256, 512, 1024, 1024],
        "layers_per_block": [4, 6, 4, 2, 2],
        "decoder_block_out_channels": [256, 512, 512, 1024],
        "decoder_layers_per_block": [4, 6, 4, 2, 2],
    },
}
SMALL = {
    "latent_channels": 16,
    "block_out_channels": [16, 32, 64, 64],
    "layers_per_block": [1, 2, 1, 1, 2],
}
SMALL_20 = {
    **SMALL,
    "decoder_causal": False,
    "decoder_block_out_channels": [16, 32, 64],
    "decoder_layers_per_block": [1, 2, 1, 2],
    **RATIOS,
}
SMALL_23 = {
    **SMALL,
    **LAYOUT_23,
    "decoder_block_out_channels": [16, 32, 32, 64],
    "decoder_layers_per_block": [1, 2, 1, 3, 1],
}
LAYOUTS = {
    "2.0": SMALL_20,
    "2.3": SMALL_23,
    "padding_swapped": {
        **SMALL_20,
        "encoder_spatial_padding_mode": "reflect",
        "decoder_spatial_padding_mode": "zeros",
    },
    "causal_decoder": {**SMALL_20, "decoder_causal": True},
}


def reference_model(config, seed=0):
    return with_random_weights(diffusers.AutoencoderKLLTX2Video(**config), seed)


def our_model(reference):
    return with_weights_of(
        reference, lambda config: LTX2VideoVAE(LTX2VideoVAEConfig.from_dict(config))
    )


def random_pixels(*shape, seed):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_encode_equals_diffusers(layout):
    reference = reference_model(LAYOUTS[layout])
    model = our_model(reference)
    for num_frames, height, width in ((17, 64, 96), (1, 96, 64)):
        pixels = random_pixels(2, 3, num_frames, height, width, seed=1)
        expected = reference.encode(pixels).latent_dist
        out = model.encode(pixels)
        assert out.mean.shape == (2, 16, num_frames // 8 + 1, height // 32, width // 32)
        assert relative_error(out.mean, expected.mode()) <= 1e-5
        assert relative_error(out.logvar, expected.logvar) <= 1e-5


@torch.no_grad()
def test_sample_equals_diffusers():
    reference = reference_model(SMALL_20)
    pixels = random_pixels(1, 3, 9, 64, 64, seed=2)
    posterior = reference.encode(pixels).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(3))
    expected = posterior.sample(torch.Generator().manual_seed(3))
    assert relative_error(sample(our_model(reference).encode(pixels), noise), expected) <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_decode_equals_diffusers(layout):
    reference = reference_model(LAYOUTS[layout])
    model = our_model(reference)
    for num_frames, height, width in ((3, 2, 3), (1, 3, 2)):
        generator = torch.Generator().manual_seed(4)
        latents = 2 * torch.randn(2, 16, num_frames, height, width, generator=generator)
        expected = reference.decode(latents).sample
        out = model.decode(latents)
        assert out.shape == (2, 3, 8 * num_frames - 7, 32 * height, 32 * width)
        assert relative_error(out, expected) <= 1e-5


@torch.no_grad()
def test_prepared_model_equals_diffusers():
    reference = reference_model(SMALL_23)
    model = our_model(reference)
    model.prepare_for_inference()
    latents = torch.randn(1, 16, 2, 3, 2, generator=torch.Generator().manual_seed(5))
    assert relative_error(model.decode(latents), reference.decode(latents).sample) <= 1e-5
    pixels = random_pixels(1, 3, 9, 64, 64, seed=6)
    expected = reference.encode(pixels).latent_dist.mean
    assert relative_error(model.encode(pixels).mean, expected) <= 1e-5


def test_statistics_are_applied_as_the_pipeline_does():
    reference = reference_model({**SMALL_20, "scaling_factor": 0.7})
    model = our_model(reference)
    raw = torch.randn(2, 16, 3, 2, 2, generator=torch.Generator().manual_seed(7))
    statistics = reference.latents_mean, reference.latents_std, 0.7
    pipeline = diffusers.LTX2ImageToVideoPipeline
    expected = pipeline._normalize_latents(raw, *statistics)
    torch.testing.assert_close(model.normalize(raw), expected)
    torch.testing.assert_close(
        model.denormalize(raw), pipeline._denormalize_latents(raw, *statistics)
    )
    torch.testing.assert_close(model.denormalize(model.normalize(raw)), raw)
    half = model.normalize(raw.bfloat16())
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("version", "num_tensors", "num_parameters"),
    [("2.0", 184, 1_222_479_601), ("2.3", 170, 726_105_969)],
)
def test_full_size_has_the_checkpoints_tensors(version, num_tensors, num_parameters):
    with torch.device("meta"):
        reference = diffusers.AutoencoderKLLTX2Video(**FULL_SIZE[version])
        model = LTX2VideoVAE(LTX2VideoVAEConfig.from_dict(dict(reference.config)))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in reference.state_dict().items()}
    assert len(shapes) == num_tensors
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
