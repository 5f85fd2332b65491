"""LTX-2's audio VAE against diffusers' at fp32, on random weights, statistics and inputs."""

import json

import diffusers
import pytest
import torch
from diffusers import LTX2Pipeline
from safetensors.torch import load_file

from raydiff.models.ltx2.audio_vae import AudioVAE, AudioVAEConfig
from tests.parity.reference_weights import with_random_weights, with_weights_of
from tests.relative_error import relative_error

SMALL = {
    "base_channels": 16,
    "ch_mult": [1, 2, 3],
    "num_res_blocks": 2,
    "latent_channels": 4,
    "mel_bins": 16,
}
CONFIGS = {
    "stereo": SMALL,
    "one_block": {**SMALL, "num_res_blocks": 1, "ch_mult": [2, 1, 1], "output_channels": 1},
    "fewer_levels": {**SMALL, "ch_mult": [1, 2]},
}


def reference_model(name, seed=0):
    return with_random_weights(diffusers.AutoencoderKLLTX2Audio(**CONFIGS[name]), seed)


def our_model(reference):
    return with_weights_of(reference, lambda config: AudioVAE(AudioVAEConfig.from_dict(config)))


@pytest.mark.parametrize("name", ["stereo", "one_block"])
@torch.no_grad()
def test_encode_equals_diffusers(name):
    reference = reference_model(name)
    model = our_model(reference)
    torch.manual_seed(1)
    for num_frames in (1, 9, 14):
        mel = 3 * torch.randn(2, 2, num_frames, 16) - 4
        expected = reference.encode(mel).latent_dist
        moments = model.encode(mel)
        assert relative_error(moments.mean, expected.mode()) <= 1e-5
        assert relative_error(moments.logvar, expected.logvar) <= 1e-5


@torch.no_grad()
def test_logvar_is_clamped_as_diffusers_does():
    reference = reference_model("stereo")
    reference.encoder.conv_out.conv.weight.mul_(100)
    mel = torch.randn(1, 2, 9, 16, generator=torch.Generator().manual_seed(6))
    logvar = our_model(reference).encode(mel).logvar
    assert (logvar.min(), logvar.max()) == (-30, 20)
    assert relative_error(logvar, reference.encode(mel).latent_dist.logvar) <= 1e-5


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_decode_equals_diffusers(name):
    reference = reference_model(name)
    model = our_model(reference)
    torch.manual_seed(2)
    for num_latents in (1, 2, 5):
        latents = 2 * torch.randn(2, 4, num_latents, 4)
        expected = reference.decode(latents).sample
        out = model.decode(latents)
        assert out.shape == expected.shape
        assert relative_error(out, expected) <= 1e-5


def test_tokens_and_statistics_are_the_pipelines():
    reference = reference_model("stereo")
    model = our_model(reference)
    torch.manual_seed(3)
    raw = torch.randn(3, 4, 7, 4)
    packed = LTX2Pipeline._pack_audio_latents(raw)
    assert torch.equal(model.pack(raw), packed)
    statistics = reference.latents_mean, reference.latents_std
    normal = LTX2Pipeline._normalize_audio_latents(packed, *statistics)
    assert relative_error(model.normalize(packed), normal) <= 1e-6
    restored = LTX2Pipeline._denormalize_audio_latents(normal, *statistics)
    assert relative_error(model.denormalize(normal), restored) <= 1e-6
    unpacked = LTX2Pipeline._unpack_audio_latents(restored, 7, num_mel_bins=4)
    assert torch.equal(model.unpack(restored), unpacked)
    assert relative_error(model.unpack(model.denormalize(model.normalize(packed))), raw) <= 1e-6


@torch.no_grad()
def test_saved_folder_loads_strictly(tmp_path):
    reference = reference_model("stereo", seed=4)
    reference.save_pretrained(tmp_path)
    with torch.device("meta"):
        config = json.loads((tmp_path / "config.json").read_text())
        model = AudioVAE(AudioVAEConfig.from_dict(config))
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    model.load_state_dict(tensors, strict=True, assign=True)
    latents = torch.randn(1, 4, 3, 4, generator=torch.Generator().manual_seed(5))
    assert relative_error(model.decode(latents), reference.decode(latents).sample) <= 1e-5


def test_full_size_names_and_counts():
    with torch.device("meta"):
        reference = diffusers.AutoencoderKLLTX2Audio()
        model = AudioVAE(AudioVAEConfig.from_dict(dict(reference.config)))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in reference.state_dict().items()}
    assert len(shapes) == 102
    assert sum(parameter.numel() for parameter in model.parameters()) == 53_248_146
    assert model.config == AudioVAEConfig.from_dict({})
