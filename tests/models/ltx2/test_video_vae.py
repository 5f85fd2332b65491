"""The video VAE's rules one by one, against what they say and not against a reference."""

import pytest
import torch
import torch.nn.functional as F

from raydiff.errors import ModelError, RowError
from raydiff.models.ltx2.upsampler import LTX2Upsampler, LTX2UpsamplerConfig
from raydiff.models.ltx2.video_layers import Carry, ClipConv, Downsample, Upsample, normalize_silu
from raydiff.models.ltx2.video_vae import LTX2VideoVAE, patchify, unpatchify
from raydiff.models.ltx2.video_vae_config import LTX2VideoVAEConfig
from tests.relative_error import relative_error

SMALL = {
    "latent_channels": 16,
    "block_out_channels": [16, 32, 64, 64],
    "layers_per_block": [1, 1, 1, 1, 1],
    "decoder_block_out_channels": [16, 32, 64],
    "decoder_layers_per_block": [1, 1, 1, 1],
}
LAYOUT_23 = {
    "decoder_block_out_channels": [16, 32, 32, 64],
    "decoder_layers_per_block": [1, 1, 1, 2, 1],
    "upsample_type": ["spatiotemporal", "spatiotemporal", "temporal", "spatial"],
    "upsample_factor": [2, 2, 1, 2],
    "upsample_residual": False,
    "decoder_spatial_padding_mode": "zeros",
}
CONFIGS = {
    "2.0": SMALL,
    "2.3": {**SMALL, **LAYOUT_23},
    "causal_decoder": {**SMALL, "decoder_causal": True},
}


@torch.no_grad()
def random_model(config, seed=0):
    model = LTX2VideoVAE(LTX2VideoVAEConfig.from_dict(config))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.3 * noise)
    return model


def random_clip(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(layer, clip):
    return layer(clip, Carry(is_ending=True))


def test_patches_put_columns_before_rows():
    pixels = random_clip(1, 3, 2, 8, 12)
    patches = patchify(pixels, 4)
    assert patches.shape == (1, 48, 2, 2, 3)
    for channel, row, column in ((0, 0, 1), (1, 2, 3), (2, 3, 0)):
        expected = pixels[:, channel, :, row::4, column::4]
        assert torch.equal(patches[:, channel * 16 + column * 4 + row], expected)
    assert torch.equal(unpatchify(patches, 4), pixels)


@pytest.mark.parametrize(("is_causal", "num_before", "num_after"), [(True, 2, 0), (False, 1, 1)])
@torch.no_grad()
def test_convolutions_repeat_the_ends_of_a_clip(is_causal, num_before, num_after):
    layer = ClipConv(4, 6, is_causal=is_causal, padding_mode="zeros")
    clip = random_clip(2, 4, 3, 5, 7)
    before, after = clip[:, :, :1], clip[:, :, -1:]
    padded = torch.cat([before] * num_before + [clip] + [after] * num_after, dim=2)
    expected = F.conv3d(padded, layer.conv.weight, layer.conv.bias, padding=(0, 1, 1))
    assert relative_error(run(layer, clip), expected) <= 1e-6


@torch.no_grad()
def test_reflection_is_in_space_alone():
    layer = ClipConv(4, 6, is_causal=False, padding_mode="reflect")
    clip = random_clip(2, 4, 3, 2, 5)
    padded = F.pad(clip.flatten(1, 2), (1, 1, 1, 1), mode="reflect").unflatten(1, (4, 3))
    padded = torch.cat([padded[:, :, :1], padded, padded[:, :, -1:]], dim=2)
    expected = F.conv3d(padded, layer.conv.weight, layer.conv.bias)
    assert relative_error(run(layer, clip), expected) <= 1e-6


@pytest.mark.parametrize("name", ["2.0", "2.3"])
@torch.no_grad()
def test_the_encoder_is_causal_and_the_decoder_is_not(name):
    model = random_model(CONFIGS[name])
    pixels = random_clip(1, 3, 17, 64, 64)
    changed = pixels.clone()
    changed[:, :, 9:] += 1.0
    before, after = model.encode(pixels).mean, model.encode(changed).mean
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert not torch.equal(before[:, :, 2], after[:, :, 2])
    latents = random_clip(1, 16, 3, 2, 2)
    changed = latents.clone()
    changed[:, :, 2] += 1.0
    assert relative_error(model.decode(changed)[:, :, :1], model.decode(latents)[:, :, :1]) > 1e-3


@torch.no_grad()
def test_downsampling_duplicates_the_first_frame():
    layer = Downsample(4, 8, (2, 1, 1), silent_conv)
    clip = random_clip(1, 4, 5, 2, 2)
    out = run(layer, clip)
    # The residual is all that is left: pairs of frames are channels, and pass one by one.
    assert out.shape == (1, 8, 3, 2, 2)
    assert torch.equal(out[:, 0::2, 0], clip[:, :, 0])
    assert torch.equal(out[:, 1::2, 0], clip[:, :, 0])
    assert torch.equal(out[:, 0::2, 1:], clip[:, :, 1::2])
    assert torch.equal(out[:, 1::2, 1:], clip[:, :, 2::2])


@torch.no_grad()
def test_the_downsampling_residual_is_a_mean_of_groups():
    layer = Downsample(4, 4, (1, 2, 2), silent_conv)
    clip = random_clip(1, 4, 3, 4, 6)
    expected = F.avg_pool3d(clip, (1, 2, 2))
    torch.testing.assert_close(run(layer, clip), expected)


@torch.no_grad()
def test_upsampling_drops_the_first_frame_and_repeats_the_residual():
    layer = Upsample(16, 8, (2, 2, 2), silent_conv, has_residual=True)
    clip = random_clip(1, 16, 3, 2, 3)
    out = run(layer, clip)
    assert out.shape == (1, 8, 5, 4, 6)
    for channel in range(8):
        parts = clip[:, 8 * (channel % 2) :][:, :8].unflatten(1, (2, 2, 2))
        for frame in range(1, 6):
            for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
                expected = parts[:, frame % 2, row, column, frame // 2]
                assert torch.equal(out[:, channel, frame - 1, row::2, column::2], expected)


@torch.no_grad()
def silent_conv(in_channels, channels):
    layer = ClipConv(in_channels, channels, is_causal=True, padding_mode="zeros")
    layer.conv.weight.zero_()
    layer.conv.bias.zero_()
    return layer


def test_the_norm_adds_1e_8_to_the_mean_square():
    x = 1e-4 * random_clip(2, 16, 2, 3, 4)
    expected = F.silu(x / (x.square().mean(dim=1, keepdim=True) + 1e-8).sqrt())
    torch.testing.assert_close(normalize_silu(x), expected)
    assert relative_error(expected, F.silu(F.normalize(x, dim=1) * 4)) > 0.1


@torch.no_grad()
def test_all_latent_channels_share_one_log_variance():
    model = random_model(SMALL)
    moments = model.encode(random_clip(1, 3, 9, 64, 64))
    assert moments.logvar.shape == moments.mean.shape
    assert torch.equal(moments.logvar, moments.logvar[:, :1].expand_as(moments.mean))
    model.encoder.conv_out.conv.bias[-1] = 100.0
    assert model.encode(random_clip(1, 3, 1, 64, 64)).logvar.unique().tolist() == [20.0]


def test_statistics_are_per_channel():
    model = random_model(SMALL)
    model.latents_mean, model.latents_std = torch.randn(16), 0.5 + torch.rand(16)
    raw = random_clip(1, 16, 2, 3, 4)
    for channel in (0, 5, 15):
        expected = (raw[:, channel] - model.latents_mean[channel]) / model.latents_std[channel]
        torch.testing.assert_close(model.normalize(raw)[:, channel], expected)


@pytest.mark.parametrize("num_frames", [1, 9, 25])
@torch.no_grad()
def test_clips_have_one_frame_more_than_a_multiple_of_8(num_frames):
    model = random_model(SMALL)
    latents = model.encode(random_clip(1, 3, num_frames, 64, 64)).mean
    assert latents.shape[2] == num_frames // 8 + 1
    assert model.decode(latents).shape[2] == num_frames


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_decoding_in_chunks_changes_nothing(name):
    model = random_model(CONFIGS[name])
    for num_latent_frames in (1, 2, 9):
        latents = random_clip(2, 16, num_latent_frames, 2, 2)
        whole = model.decode(latents)
        for num_frames in (8, 24):
            parts = list(model.decode_in_chunks(latents, num_frames))
            out = torch.cat(parts, dim=2)
            assert out.shape == whole.shape
            assert relative_error(out, whole) <= 1e-5
            assert max(part.shape[2] for part in parts) <= max(num_frames, 16)


@torch.no_grad()
def test_encoding_in_chunks_changes_nothing():
    model = random_model(SMALL)
    for num_frames in (1, 9, 41):
        pixels = random_clip(1, 3, num_frames, 64, 64)
        whole = model.encode(pixels)
        for chunk in (8, 24):
            parts = list(model.encode_in_chunks(pixels, chunk))
            means, logvars = (torch.cat(values, dim=2) for values in zip(*parts, strict=True))
            assert relative_error(means, whole.mean) <= 1e-5
            assert relative_error(logvars, whole.logvar) <= 1e-5


@torch.no_grad()
def test_no_layer_sees_more_than_a_chunk_and_its_neighbours():
    model = random_model(SMALL)
    seen = {}
    for name, module in model.decoder.named_modules():
        if isinstance(module, torch.nn.Conv3d):
            module.register_forward_pre_hook(
                lambda _module, args, name=name: seen.setdefault(name, []).append(args[0].shape[2])
            )
    for _ in model.decode_in_chunks(random_clip(1, 16, 12, 2, 2), 16):
        pass
    largest = {name: max(lengths) - 2 for name, lengths in seen.items()}
    assert largest["conv_in.conv"] == 2
    assert largest["up_blocks.0.resnets.0.conv1.conv"] == 4
    assert largest["conv_out.conv"] == 16
    assert sum(length - 2 for length in seen["conv_out.conv"]) == 8 * 12 - 7


@torch.no_grad()
def test_bfloat16_stays_near_float32():
    model = random_model(SMALL)
    latents = random_clip(1, 16, 2, 2, 3)
    exact = model.decode(latents)
    model.bfloat16().prepare_for_inference()
    rounded = model.decode(latents)
    assert rounded.dtype == torch.bfloat16
    assert relative_error(rounded.float(), exact) <= 0.05


def test_a_picture_too_narrow_to_mirror_is_refused():
    with pytest.raises(RowError, match=r"64 pixels high and 32 wide; .* needs 64 at least"):
        random_model(SMALL).decode(torch.zeros(1, 16, 1, 2, 1))
    assert random_model(CONFIGS["2.3"]).decode(torch.zeros(1, 16, 1, 1, 1)).shape[3:] == (32, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "_class_name has AutoencoderKL"),
        ({"timestep_conditioning": True}, "timestep_conditioning has True"),
        ({"decoder_inject_noise": [False, True, False]}, "decoder_inject_noise has True"),
        ({"patch_size_t": 2}, "patch_size_t has 2"),
        ({"encoder_causal": False}, "encoder_causal has False"),
        ({"spatio_temporal_scaling": [True, False]}, "spatio_temporal_scaling has False"),
        ({"downsample_type": ["conv"] * 4}, "downsample_type has conv; only spatial or temporal"),
        ({"decoder_spatial_padding_mode": "replicate"}, "has replicate; only zeros or reflect"),
        ({"dropout": 0.5}, "dropout is 0.5; raydiff does not know"),
        ({"scaling_facto": 2.0}, 'did you mean "scaling_factor"'),
        ({"layers_per_block": [1, 1]}, "layers_per_block has 2 values .* it needs 5"),
        ({"upsample_factor": [2, 2]}, "upsample_factor has 2 values .* it needs 3"),
        ({"block_out_channels": [16, 32, 60, 64]}, "has 60 after 32; it must be a multiple of 8"),
        ({"decoder_block_out_channels": [16, 48, 64]}, "has 48 where the block before leaves 32"),
        ({"decoder_block_out_channels": [3, 6, 12]}, "of 12 channels that become 6"),
        ({"upsample_type": ["spatial"] * 3}, "the decoder must undo"),
        ({"spatial_compression_ratio": 64}, "spatial_compression_ratio is 64; .* make it 32"),
    ],
)
def test_config_refuses_what_it_cannot_build(change, message):
    with pytest.raises(ModelError, match=message):
        LTX2VideoVAEConfig.from_dict({**SMALL, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": 2}, "dims is 2; only 3"),
        ({"rational_spatial_scale": 1.5}, "rational_spatial_scale is 1.5; only 2.0"),
        ({"spatial_upsample": False}, "at least one must be true"),
        ({"mid_channels": 48}, "mid_channels is 48; it must be a multiple of 32"),
        ({"mid_channel": 64}, 'did you mean "mid_channels"'),
    ],
)
def test_upsampler_config_refuses_what_it_cannot_build(change, message):
    with pytest.raises(ModelError, match=message):
        LTX2UpsamplerConfig.from_dict(change)


@torch.no_grad()
def test_spatial_upsampling_treats_frames_alike():
    """Up to the norms and convolutions around it, which see all frames."""
    model = LTX2Upsampler(
        LTX2UpsamplerConfig(in_channels=4, mid_channels=32, num_blocks_per_stage=0)
    )
    hidden = random_clip(1, 32, 3, 2, 2)
    frames = [model._enlarge(frame) for frame in hidden.split(1, dim=2)]
    torch.testing.assert_close(model._enlarge(hidden), torch.cat(frames, dim=2))
    expected = F.pixel_shuffle(model.upsampler.conv(hidden[:, :, 1]), 2)
    torch.testing.assert_close(frames[1][:, :, 0], expected)
