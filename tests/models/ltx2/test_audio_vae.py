"""What LTX-2's audio VAE promises beside equality with diffusers, and what its config refuses."""

import pytest
import torch

from raydiff.errors import ModelError
from raydiff.models.ltx2.audio_vae import AudioVAE, AudioVAEConfig, normalize_silu

SMALL = {
    "base_channels": 16,
    "ch_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "latent_channels": 4,
    "mel_bins": 16,
}


@torch.no_grad()
def small_model(seed=0):
    model = AudioVAE(AudioVAEConfig.from_dict(SMALL))
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(noise / tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 0.3 * noise)
    model.latents_std.abs_().add_(0.5)
    return model


@pytest.mark.parametrize(
    ("num_frames", "frame_rate", "num_latents"),
    [(121, 24.0, 126), (121, 25.0, 121), (97, 30.0, 81), (9, 60.0, 4), (121, 23.976, 126)],
)
def test_a_second_has_25_latents(num_frames, frame_rate, num_latents):
    config = AudioVAEConfig.from_dict({})
    assert config.latents_per_second == 25
    assert config.num_latents(num_frames, frame_rate) == num_latents


def test_latent_count_rounds_halves_to_even_as_the_reference_does():
    config = AudioVAEConfig.from_dict({})
    assert [config.num_latents(num, 50.0) for num in (1, 3, 5)] == [0, 2, 2]


def test_tokens_are_packed_channel_major():
    model = small_model()
    latents = torch.arange(2 * 4 * 3 * 4).view(2, 4, 3, 4)  # (B, C, T, M)
    tokens = model.pack(latents)
    assert tokens.shape == (2, 3, 16)
    assert tokens[1, 2, 4 * 3 + 1] == latents[1, 3, 2, 1]
    assert torch.equal(model.unpack(tokens), latents)


def test_statistics_apply_to_packed_tokens():
    """Each frequency of a latent channel has a mean and a deviation of its own."""
    model = small_model()
    zeros = model.unpack(model.denormalize(torch.zeros(1, 2, 16)))
    assert torch.equal(zeros[0, 3, 1], model.latents_mean[12:16])
    ones = model.unpack(model.denormalize(torch.ones(1, 2, 16)))
    torch.testing.assert_close((ones - zeros)[0, 3, 1], model.latents_std[12:16])


def test_statistics_follow_the_latents_precision():
    model = small_model().bfloat16()
    tokens = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(1))
    assert model.denormalize(tokens).dtype == torch.float32
    assert model.decode(model.unpack(tokens)).dtype == torch.bfloat16


@pytest.mark.parametrize("num_latents", [1, 2, 7])
def test_the_decoder_gives_4t_minus_3_mel_frames(num_latents):
    model = small_model()
    mel = model.decode(torch.zeros(1, 4, num_latents, 4))
    assert mel.shape == (1, 2, 4 * num_latents - 3, 16)
    assert model.config.num_mel_frames(num_latents) == mel.shape[2]
    assert model.encode(mel).mean.shape == (1, 4, num_latents, 4)


def test_both_ways_are_causal_in_time():
    model = small_model()
    torch.manual_seed(2)
    latents = torch.randn(1, 4, 6, 4)
    mel = model.decode(latents)
    changed = latents.clone()
    changed[:, :, 4:] += 1
    assert torch.equal(model.decode(changed)[:, :, :13], mel[:, :, :13])
    assert not torch.equal(model.decode(changed)[:, :, 13], mel[:, :, 13])
    mean = model.encode(mel).mean
    mel[:, :, 13:] += 1
    torch.testing.assert_close(model.encode(mel).mean[:, :, :4], mean[:, :, :4])
    assert not torch.allclose(model.encode(mel).mean[:, :, 4], mean[:, :, 4])


def test_mel_bins_are_not_causal():
    model = small_model()
    latents = torch.randn(1, 4, 2, 4, generator=torch.Generator().manual_seed(3))
    mel = model.decode(latents)
    latents[:, :, :, 3] += 1
    assert not torch.allclose(model.decode(latents)[..., 0], mel[..., 0])


def test_the_norm_divides_by_the_root_mean_square_of_channels():
    x = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(4)) * 1e-3
    normal = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(normalize_silu(x), torch.nn.functional.silu(normal))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderKLLTX2Video"}, "_class_name is 'AutoencoderKLLTX2Video'"),
        ({"norm_type": "group"}, "norm_type is 'group'; only 'pixel'"),
        ({"causality_axis": "width"}, "causality_axis is 'width'; only 'height'"),
        ({"attn_resolutions": [64]}, r"attn_resolutions is \[64\]"),
        ({"mid_block_add_attention": True}, "mid_block_add_attention is True"),
        ({"double_z": False}, "double_z is False"),
        ({"mel_bin": 64}, 'mel_bin is not an option. did you mean "mel_bins"?'),
        ({"num_res_blocks": 0}, "num_res_blocks is 0; expected positive integers"),
        ({"ch_mult": []}, r"ch_mult is \(\); expected positive integers"),
        ({"mel_bins": 18}, "mel_bins is 18; it must be a multiple of 4"),
        ({"base_channels": 32}, "base_channels is 32; the statistics .* a token 16"),
    ],
)
def test_config_refuses_what_it_cannot_build(change, message):
    with pytest.raises(ModelError, match=message):
        AudioVAEConfig.from_dict({**SMALL, **change})


def test_config_takes_what_has_no_effect():
    config = AudioVAEConfig.from_dict({**SMALL, "dropout": 0.0, "resolution": 256, "_x": 1})
    assert config == AudioVAEConfig.from_dict({**SMALL, "attn_resolutions": None})
