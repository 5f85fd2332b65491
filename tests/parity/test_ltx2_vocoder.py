"""LTX-2's vocoders against diffusers' at fp32, on random weights, filters, tables and inputs."""

import json

import pytest
import torch
from diffusers.pipelines.ltx2 import LTX2Vocoder, LTX2VocoderWithBWE
from safetensors.torch import load_file

from raydiff.models.ltx2.vocoder import build_vocoder, resample
from tests.parity.reference_weights import with_weights_of
from tests.relative_error import relative_error

V20 = {
    "in_channels": 12,
    "hidden_channels": 32,
    "upsample_kernel_sizes": [7, 4, 6],
    "upsample_factors": [3, 2, 2],
    "resnet_kernel_sizes": [3, 7],
    "resnet_dilations": [[1, 3, 5], [1, 2]],
    "leaky_relu_negative_slope": 0.2,
    "output_sampling_rate": 12000,
}
SNAKE = {**V20, "act_fn": "snakebeta", "antialias": True, "final_act_fn": "clamp"}
OTHER_FILTER = {**SNAKE, "antialias_ratio": 3, "antialias_kernel_size": 7, "final_act_fn": None}
V23 = {
    "in_channels": 12,
    "hidden_channels": 16,
    "upsample_kernel_sizes": [5, 4],
    "upsample_factors": [3, 2],
    "resnet_kernel_sizes": [3, 5],
    "resnet_dilations": [[1, 3], [1, 2]],
    "bwe_in_channels": 10,
    "bwe_hidden_channels": 24,
    "bwe_upsample_kernel_sizes": [8, 5],
    "bwe_upsample_factors": [4, 3],
    "bwe_resnet_kernel_sizes": [3],
    "bwe_resnet_dilations": [[1, 2]],
    "filter_length": 16,
    "hop_length": 4,
    "window_length": 16,
    "num_mel_channels": 5,
}
V23_OTHER_ENDS = {
    **V23,
    "final_act_fn": "tanh",
    "final_bias": True,
    "bwe_final_act_fn": "clamp",
    "bwe_final_bias": True,
}
CONFIGS = {
    "v20": V20,
    "snake": SNAKE,
    "other_filter": OTHER_FILTER,
    "v23": V23,
    "v23_other_ends": V23_OTHER_ENDS,
}


def reference_class(name):
    return LTX2VocoderWithBWE if name.startswith("v23") else LTX2Vocoder


@torch.no_grad()
def reference_model(name, seed=0):
    """diffusers' model with random parameters and tables; filters near their own values."""
    model = reference_class(name)(**CONFIGS[name]).eval()
    generator = torch.Generator().manual_seed(seed)
    for tensor_name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor_name.endswith(".filter"):
            tensor.add_(0.05 * noise)
        elif tensor_name.endswith("mel_basis"):
            tensor.copy_(noise.abs() / tensor.shape[1])
        elif tensor.ndim > 1:
            tensor.copy_(noise * (0.7 / tensor[0].numel()) ** 0.5)
        else:
            tensor.copy_(0.3 * noise)
    return model


def our_model(reference):
    return with_weights_of(reference, build_vocoder)


@pytest.mark.filterwarnings("ignore:Accessing config attribute `hop_length`")
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_sound_equals_diffusers(name):
    reference = reference_model(name)
    model = our_model(reference)
    torch.manual_seed(1)
    for num_frames in (2, 7):  # 12 or 42 samples of the first network: a hop is 4
        mel = 2 * torch.randn(2, 2, num_frames, 6)
        expected = reference(mel)
        sound = model(mel)
        assert sound.shape == expected.shape
        assert sound.shape[2] == num_frames * model.config.samples_per_frame
        assert relative_error(sound, expected) <= 1e-5
    assert expected.std() > 0.05


@pytest.mark.parametrize("ratio", [2, 3])
def test_resampling_equals_diffusers(ratio):
    config = {**V23, "output_sampling_rate": 16000 * ratio}
    reference = LTX2VocoderWithBWE(**config).resampler
    sound = torch.randn(2, 3, 37, generator=torch.Generator().manual_seed(2))
    assert relative_error(resample(sound, ratio), reference(sound)) <= 1e-6


@pytest.mark.parametrize("name", ["v20", "v23"])
@torch.no_grad()
def test_saved_folder_loads_strictly(tmp_path, name):
    reference = reference_model(name, seed=3)
    reference.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = build_vocoder(json.loads((tmp_path / "config.json").read_text()))
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    model.load_state_dict(tensors, strict=True, assign=True)
    mel = torch.randn(1, 2, 4, 6, generator=torch.Generator().manual_seed(4))
    assert relative_error(model(mel), reference(mel)) <= 1e-5


@pytest.mark.parametrize(
    ("name", "num_tensors", "num_parameters", "samples_per_frame"),
    [("v20", 194, 55_592_802, 240), ("v23", 1227, 128_537_448, 480)],
)
def test_full_size_names_and_counts(name, num_tensors, num_parameters, samples_per_frame):
    class_name = reference_class(name).__name__
    with torch.device("meta"):
        reference = reference_class(name)()
        model = build_vocoder({**reference.config, "_class_name": class_name})
        from_defaults = build_vocoder({"_class_name": class_name})
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in reference.state_dict().items()}
    assert len(shapes) == num_tensors
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    assert model.config.samples_per_frame == samples_per_frame
    assert model.config.output_sampling_rate == reference.config.output_sampling_rate
    assert model.config == from_defaults.config
