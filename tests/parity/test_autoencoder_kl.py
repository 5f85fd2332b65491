"""AutoencoderKL against diffusers' at fp32, on random weights (norms and biases too) and inputs."""

import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from raydiff.errors import ModelError
from raydiff.models.autoencoder_kl import (
    AutoencoderKL,
    AutoencoderKLConfig,
    Moments,
    attend,
    sample,
)
from tests.relative_error import relative_error

FOUR_BLOCKS = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 48, 64],
    "norm_num_groups": 8,
}
CONFIGS = {
    "sd": {**FOUR_BLOCKS, "layers_per_block": 2, "latent_channels": 4},
    "sdxl": {
        **FOUR_BLOCKS,
        "layers_per_block": 1,
        "latent_channels": 4,
        "block_out_channels": [16, 32, 64, 64],
        "scaling_factor": 0.13025,
    },
    "sdxl_mean_std": {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [16, 24],
        "norm_num_groups": 8,
        "scaling_factor": 0.5,
        "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
        "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
    },
    "flux": {
        **FOUR_BLOCKS,
        "layers_per_block": 1,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    },
    "no_attention": {
        **FOUR_BLOCKS,
        "layers_per_block": 1,
        "mid_block_add_attention": False,
    },
}
LAYOUTS = {
    "loaded": None,
    "prepared": False,
    "prepared_channels_last": True,
}


@torch.no_grad()
def reference_model(name, seed=0):
    """Build diffusers' model with every parameter random, norms and biases included."""
    model = diffusers.AutoencoderKL(**CONFIGS[name]).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        elif "norm" in parameter_name and parameter_name.endswith("weight"):
            parameter.copy_(1 + 0.3 * noise)
        else:
            parameter.copy_(0.3 * noise)
    return model


def our_model(reference, layout="loaded"):
    with torch.device("meta"):
        model = AutoencoderKL(AutoencoderKLConfig.from_dict(dict(reference.config)))
    model.load_state_dict(reference.state_dict(), strict=True, assign=True)
    if LAYOUTS[layout] is not None:
        model.prepare_for_inference(channels_last=LAYOUTS[layout])
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_encode_equals_diffusers(name, layout):
    reference = reference_model(name)
    model = our_model(reference, layout)
    torch.manual_seed(1)
    for height, width in ((64, 40), (45, 71)):
        pixels = torch.rand(2, 3, height, width) * 2 - 1
        expected = reference.encode(pixels).latent_dist
        out = model.encode(pixels)
        assert out.mean.shape[2:] == (
            height // model.config.downscale,
            width // model.config.downscale,
        )
        assert relative_error(out.mean, expected.mean) <= 1e-5
        assert relative_error(out.logvar, expected.logvar) <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_decode_equals_diffusers(name, layout):
    reference = reference_model(name)
    model = our_model(reference, layout)
    torch.manual_seed(2)
    for height, width in ((8, 8), (5, 9)):
        latents = 2 * torch.randn(2, model.config.latent_channels, height, width)
        expected = reference.decode(latents).sample
        out = model.decode(latents)
        assert out.shape == expected.shape
        assert relative_error(out, expected) <= 1e-5


@torch.no_grad()
def test_logvar_is_clamped_as_diffusers_does():
    reference = reference_model("sd")
    reference.quant_conv.weight.mul_(100)
    model = our_model(reference)
    torch.manual_seed(3)
    pixels = torch.rand(1, 3, 48, 48) * 2 - 1
    logvar = model.encode(pixels).logvar
    assert logvar.min() == -30
    assert logvar.max() == 20
    assert relative_error(logvar, reference.encode(pixels).latent_dist.logvar) <= 1e-5


@torch.no_grad()
def test_sample_equals_diffusers():
    reference = reference_model("sd")
    torch.manual_seed(4)
    posterior = reference.encode(torch.rand(2, 3, 40, 24) * 2 - 1).latent_dist
    expected = posterior.sample(torch.Generator().manual_seed(9))
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(9))
    assert torch.equal(sample(Moments(posterior.mean, posterior.logvar), noise), expected)


def test_prepare_for_inference_can_be_repeated():
    reference = reference_model("sd")
    model = our_model(reference)
    latents = torch.randn(1, 4, 6, 7, generator=torch.Generator().manual_seed(5))
    model.prepare_for_inference(channels_last=False)
    once = model.decode(latents)
    model.prepare_for_inference(channels_last=False)
    assert torch.equal(model.decode(latents), once)
    names = model.state_dict()
    assert "decoder.mid_block.attentions.0.to_qkv.weight" in names
    assert not any(".to_q." in name for name in names)


def test_preparation_folds_the_residual_blocks_biases():
    """What is left are the convolutions before and after them, and those that change the size."""
    reference = reference_model("sdxl")
    model = our_model(reference, "prepared")
    biased = {
        name.removesuffix(".bias")
        for name, _ in model.named_parameters()
        if name.endswith(".bias") and "conv" in name and "norm" not in name
    }
    between = {name for name in biased if ".conv_shortcut" not in name and "samplers" not in name}
    ends = {f"{part}.{conv}" for part in ("encoder", "decoder") for conv in ("conv_in", "conv_out")}
    assert between == ends | {"quant_conv", "post_quant_conv"}
    assert len(biased - between) == 2 * (3 + 2)  # size changes, and width changes 16-32-64


def test_channels_last_reaches_the_pixels():
    model = our_model(reference_model("sd"), "prepared_channels_last")
    latents = torch.randn(1, 4, 6, 7, generator=torch.Generator().manual_seed(6))
    pixels = model.decode(latents)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert not pixels.is_contiguous()
    assert not pixels.requires_grad


def sdxl_scaling(latents, config, *, mean, std):
    """The SDXL pipeline's own arithmetic, forward and back."""
    mean = torch.tensor(mean).view(1, -1, 1, 1)
    std = torch.tensor(std).view(1, -1, 1, 1)
    return (
        (latents - mean) * config["scaling_factor"] / std,
        latents * std / config["scaling_factor"] + mean,
    )


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux", "sdxl_mean_std"])
def test_scaling_is_the_pipelines(name):
    config = CONFIGS[name]
    with torch.device("meta"):
        model = AutoencoderKL(AutoencoderKLConfig.from_dict(config))
    channels = config.get("latent_channels", 4)
    latents = torch.randn(3, channels, 5, 7, generator=torch.Generator().manual_seed(7))
    if "latents_mean" in config:
        normal, raw = sdxl_scaling(
            latents, config, mean=config["latents_mean"], std=config["latents_std"]
        )
    else:
        factor, shift = config.get("scaling_factor", 0.18215), config.get("shift_factor", 0.0)
        normal, raw = (latents - shift) * factor, latents / factor + shift
    torch.testing.assert_close(model.normalize(latents), normal, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(model.denormalize(latents), raw, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(model.normalize(model.denormalize(latents)), latents)


@pytest.mark.parametrize("max_scores", [1, 500, 2 * 37 * 10, 2 * 37 * 36])
def test_attention_in_slices_equals_whole(max_scores):
    torch.manual_seed(8)
    query, key, value = torch.randn(3, 2, 1, 37, 24).unbind(0)
    whole = attend(query, key, value)
    scores = query @ key.transpose(2, 3) / 24**0.5
    assert relative_error(whole, scores.softmax(-1) @ value) <= 1e-6
    sliced = attend(query, key, value, max_scores=max_scores)
    assert relative_error(sliced, whole) <= 1e-6


@torch.no_grad()
def test_saved_folder_loads_strictly(tmp_path):
    reference = reference_model("flux", seed=10)
    reference.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with torch.device("meta"):
        model = AutoencoderKL(AutoencoderKLConfig.from_dict(config))
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    model.load_state_dict(tensors, strict=True, assign=True)
    latents = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(11))
    assert relative_error(model.decode(latents), reference.decode(latents).sample) <= 1e-5


FULL_SIZE = {
    **FOUR_BLOCKS,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
}


@pytest.mark.parametrize(
    ("overrides", "num_tensors", "num_parameters"),
    [
        ({"latent_channels": 4}, 248, 83_653_863),
        (
            {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
            244,
            83_819_683,
        ),
    ],
)
def test_full_size_names_and_counts(overrides, num_tensors, num_parameters):
    config = {**FULL_SIZE, **overrides}
    with torch.device("meta"):
        model = AutoencoderKL(AutoencoderKLConfig.from_dict(config))
        reference = diffusers.AutoencoderKL(**config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in reference.state_dict().items()}
    assert len(shapes) == num_tensors
    assert sum(shape.numel() for shape in shapes.values()) == num_parameters


def test_compiles_as_one_graph():
    model = our_model(reference_model("sdxl_mean_std"), "prepared")

    def render(latents):
        return model.decode(model.denormalize(latents))

    latents = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(12))
    compiled = torch.compile(render, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(latents), render(latents)) <= 1e-5


def test_config_defaults_and_unknown_keys():
    old = {**FULL_SIZE, "sample_size": 768, "act_fn": "silu", "latents_mean": None}
    config = AutoencoderKLConfig.from_dict({**old, "_class_name": "AutoencoderKL", "new_key": [1]})
    assert config.scaling_factor == 0.18215
    assert config.shift_factor is None
    assert config.latents_mean is None
    assert config.downscale == 8
    assert AutoencoderKLConfig.from_dict({**old, "shift_factor": 0.0}).shift_factor == 0.0
    assert AutoencoderKLConfig.from_dict({**old, "force_upcast": False}).force_upcast is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "_class_name is AutoencoderTiny"),
        ({"act_fn": "gelu"}, "act_fn is gelu"),
        (
            {"down_block_types": ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]},
            "down_block_types has AttnDownEncoderBlock2D",
        ),
        (
            {"up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 3},
            "up_block_types has AttnUpDecoderBlock2D",
        ),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "up_block_types has 3 blocks"),
        ({"norm_num_groups": 7}, "multiple of norm_num_groups, 7"),
        ({"latents_mean": [0.0] * 4}, "only one of latents_mean and latents_std"),
        (
            {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 4},
            "latents_mean has 3 values",
        ),
        (
            {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "shift_factor": 0.1},
            "shift_factor is 0.1 and latents_mean",
        ),
    ],
)
def test_config_refuses_what_it_cannot_build(change, message):
    with pytest.raises(ModelError, match=message):
        AutoencoderKLConfig.from_dict({**FULL_SIZE, **change})
