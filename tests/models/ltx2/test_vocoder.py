"""What LTX-2's vocoders promise beside equality with diffusers, and what their configs refuse."""

import math

import pytest
import torch

from raydiff.errors import ModelError
from raydiff.models.ltx2.vocoder import (
    AntiAliased,
    SnakeBeta,
    Vocoder,
    VocoderWithBWE,
    build_vocoder,
    resample,
)

V20 = {
    "_class_name": "LTX2Vocoder",
    "in_channels": 12,
    "hidden_channels": 16,
    "upsample_kernel_sizes": [5, 4],
    "upsample_factors": [3, 2],
    "resnet_kernel_sizes": [3],
    "resnet_dilations": [[1, 2]],
}
V23 = {
    **V20,
    "_class_name": "LTX2VocoderWithBWE",
    "bwe_in_channels": 10,
    "bwe_hidden_channels": 16,
    "bwe_upsample_kernel_sizes": [8, 5],
    "bwe_upsample_factors": [4, 3],
    "bwe_resnet_kernel_sizes": [3],
    "bwe_resnet_dilations": [[1]],
    "filter_length": 16,
    "window_length": 16,
    "hop_length": 4,
    "num_mel_channels": 5,
}


@torch.no_grad()
def filled(config, scale=0.7, seed=0):
    """A vocoder with random weights, and filters that sum to one as the checkpoint's do."""
    model = build_vocoder(config)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith(".filter"):
            tensor.fill_(1 / tensor.shape[2])
        elif name.endswith("mel_basis"):
            tensor.copy_(noise.abs() / tensor.shape[1])
        elif tensor.ndim > 1:
            tensor.copy_(scale * noise / tensor[0].numel() ** 0.5)
        else:
            tensor.copy_(0.3 * noise)
    return model


def random_mel(seed=1):
    return torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def test_sound_channels_are_outside_mel_bins():
    """Input channel 7 of the first convolution is the second sound channel's mel bin 1."""
    model = filled(V20)
    mel = random_mel()
    sound = model(mel)
    model.conv_in.weight[:, 7] = 0
    without = model(mel)
    assert not torch.allclose(without, sound)
    mel[:, 1, :, 1] += 5
    assert torch.equal(model(mel), without)


def test_the_last_activation_has_slope_0_01_whatever_the_config_says():
    model = build_vocoder({**V20, "leaky_relu_negative_slope": 0.3})
    assert model.act_out.negative_slope == 0.01
    assert model.resnets[0].acts1[0].negative_slope == 0.3


def test_sound_comes_in_the_precision_of_the_weights():
    """The decoder before it may run in bfloat16; the vocoder is loaded in float32."""
    model = filled(V23)
    mel = random_mel().bfloat16()
    sound = model(mel)
    assert sound.dtype == torch.float32
    assert torch.equal(sound, model(mel.float()))


@pytest.mark.parametrize("config", [V20, V23], ids=["v20", "v23"])
def test_loud_sound_stays_in_range(config):
    sound = filled(config, scale=20.0)(random_mel())
    assert sound.abs().max() <= 1
    assert (sound.abs() > 0.99).any()


def test_rows_do_not_depend_on_each_other():
    model, mel = filled(V23), random_mel()
    whole = model(mel)
    torch.testing.assert_close(model(mel[1:]), whole[1:])


def test_a_silent_second_network_leaves_the_resampled_first():
    model, mel = filled(V23), random_mel()
    model.bwe_generator.conv_out.weight.zero_()
    low = model.vocoder(mel)
    assert low.shape[2] % model.config.hop_length == 0
    torch.testing.assert_close(model(mel), resample(low, 3).clamp(-1, 1))


def test_the_second_network_hears_no_later_samples():
    """Its spectrogram is causal: 12 samples of history and none of the next frame."""
    mels = filled(V23).mel_stft
    sound = torch.randn(1, 2, 24, generator=torch.Generator().manual_seed(2))
    before = mels(sound)
    assert before.shape == (1, 2, 6, 5)
    sound[..., 12:] += 1
    assert torch.equal(mels(sound)[:, :, :3], before[:, :, :3])
    assert not torch.allclose(mels(sound)[:, :, 3], before[:, :, 3])


def test_silence_is_the_logarithm_of_the_floor():
    mels = filled(V23).mel_stft(torch.zeros(1, 2, 8))
    torch.testing.assert_close(mels, torch.full((1, 2, 2, 5), math.log(1e-5)))


def test_resampling_keeps_a_tone():
    low = torch.sin(2 * math.pi * 440 * torch.arange(400) / 16000)
    high = torch.sin(2 * math.pi * 440 * torch.arange(1200) / 48000)
    out = resample(low[None, None], 3)[0, 0]
    torch.testing.assert_close(out[60:-60], high[60:-60], rtol=0, atol=2e-3)


def test_resampling_makes_no_overtones():
    """Zeros between samples would mirror 5 kHz at 11 kHz; the filter takes it out."""
    low = torch.sin(2 * math.pi * 5000 * torch.arange(1600) / 16000)
    spectrum = torch.fft.rfft(resample(low[None, None], 3)[0, 0, 480:-480])
    hertz = torch.arange(len(spectrum)) * 48000 / 3840
    assert spectrum[hertz > 9000].abs().max() < 1e-2 * spectrum.abs().max()


def test_snake_adds_a_periodic_term_with_its_own_height():
    snake = SnakeBeta(2)
    with torch.no_grad():
        snake.alpha.copy_(torch.tensor([0.5, -0.2]))
        snake.beta.copy_(torch.tensor([1.0, 0.3]))
    x = torch.randn(1, 2, 9, generator=torch.Generator().manual_seed(3))
    alpha, beta = snake.alpha.exp()[:, None], snake.beta.exp()[:, None]
    torch.testing.assert_close(snake(x), x + torch.sin(alpha * x) ** 2 / beta)


def test_activations_use_the_checkpoints_filters():
    act = AntiAliased(1, ratio=2, kernel_size=12)
    for parameter in act.parameters():
        parameter.data.zero_()
    act.upsample.filter.zero_()
    act.downsample.filter.fill_(1 / 12)
    x = torch.ones(1, 1, 8)
    assert torch.equal(act(x), torch.zeros(1, 1, 8))
    act.upsample.filter.fill_(1 / 12)
    torch.testing.assert_close(act(x), x + math.sin(1) ** 2)


def test_the_class_name_chooses_the_network():
    assert isinstance(build_vocoder(V20), Vocoder)
    assert isinstance(build_vocoder(V23), VocoderWithBWE)
    with pytest.raises(ModelError, match="_class_name is 'Snac'; only 'LTX2Vocoder"):
        build_vocoder({**V20, "_class_name": "Snac"})


def test_rates_and_lengths():
    first, both = build_vocoder(V20).config, build_vocoder(V23).config
    assert (first.output_sampling_rate, first.samples_per_frame) == (24000, 6)
    assert (both.output_sampling_rate, both.samples_per_frame, both.ratio) == (48000, 18, 3)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (V20, {"act_fn": "snake"}, "act_fn is 'snake'; only 'leaky_relu' or 'snakebeta'"),
        (V20, {"act_fn": "snakebeta"}, "act_fn is snakebeta and antialias False"),
        (V20, {"final_act_fn": "relu"}, "final_act_fn is 'relu'"),
        (V20, {"in_channel": 128}, 'did you mean "in_channels"?'),
        (V20, {"hidden_channels": 18}, "hidden_channels is 18; .* a multiple of 4"),
        (V20, {"hidden_channels": "16"}, "hidden_channels is '16'; expected positive integers"),
        (V20, {"upsample_factors": [3]}, "upsample_kernel_sizes has 2 values and upsample_factors"),
        (V20, {"upsample_factors": [2, 2]}, "upsample_kernel_sizes has 5 for a factor of 2"),
        (V20, {"resnet_kernel_sizes": [4]}, "resnet_kernel_sizes has 4; only odd"),
        (V20, {"resnet_dilations": [[0]]}, r"resnet_dilations is \(0,\)"),
        (V20, {"resnet_dilations": []}, "resnet_kernel_sizes has 1 values and resnet_dilations 0"),
        (V23, {"bwe_act_fn": "snake"}, "bwe_act_fn is 'snake'; only"),
        (V23, {"window_length": 12}, "window_length is 12; only 16"),
        (V23, {"filter_length": 20}, "window_length is 16; only 20"),
        (V23, {"hop_length": 20}, "hop_length is 20; it must be no more than filter_length, 16"),
        (V23, {"hop_length": 2}, "bwe_upsample_factors' product is 12; .*, 6"),
        (V23, {"output_sampling_rate": 44100}, "output_sampling_rate is 44100; .* 16000"),
        (V23, {"bwe_in_channels": 12}, "bwe_in_channels is 12; .*, 10"),
        (V23, {"bwe_out_channels": 1}, "bwe_out_channels is 1; it must be out_channels, 2"),
    ],
)
def test_config_refuses_what_it_cannot_build(config, change, message):
    with pytest.raises(ModelError, match=message):
        build_vocoder({**config, **change})
