"""The UNet against diffusers' on random weights and inputs, at fp32 and at full size on meta."""

import diffusers
import pytest
import torch

from raydiff.models.unet import UNet, UNetConfig

SD21 = {
    "block_out_channels": [32, 64, 96, 96],
    "attention_head_dim": [1, 2, 3, 3],
    "cross_attention_dim": 48,
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "upcast_attention": True,
    "sample_size": 16,
}
CONV_PROJECTION = {**SD21, "use_linear_projection": False, "attention_head_dim": 4}
SDXL = {
    "block_out_channels": [32, 64, 128],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 4],
    "attention_head_dim": [1, 2, 4],
    "cross_attention_dim": 56,
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 40 + 6 * 16,
}
REFINER = {
    **SDXL,
    "block_out_channels": [24, 48, 96, 96],
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
    "transformer_layers_per_block": 2,
    "attention_head_dim": [1, 2, 4, 4],
    "projection_class_embeddings_input_dim": 40 + 5 * 16,
}
CONFIGS = {
    "sd21": SD21,
    "conv_projection": CONV_PROJECTION,
    "sdxl": SDXL,
    "refiner": REFINER,
}
SIZES = [(16, 16), (13, 9), (17, 20)]
STATES = ["loaded", "prepared", "channels_last"]

FULL_SIZE = {
    "sd21": (
        {
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
            "sample_size": 96,
            "upcast_attention": True,
        },
        686,
        865_910_724,
    ),
    "sdxl": (
        {
            **SDXL,
            "block_out_channels": [320, 640, 1280],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "norm_num_groups": 32,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
        },
        1680,
        2_567_463_684,
    ),
    "refiner": (
        {
            **REFINER,
            "block_out_channels": [384, 768, 1536, 1536],
            "transformer_layers_per_block": 4,
            "attention_head_dim": [6, 12, 24, 24],
            "cross_attention_dim": 1280,
            "norm_num_groups": 32,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2560,
        },
        1220,
        2_259_526_660,
    ),
}


@pytest.fixture(scope="module")
def references():
    """diffusers' model of each small config, its weights scaled so that activations stay near 1."""
    return {name: random_reference(config) for name, config in CONFIGS.items()}


def random_reference(config):
    torch.manual_seed(7)
    model = diffusers.UNet2DConditionModel(**config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            parameter.normal_(std=0.2)
        else:
            parameter.normal_(mean=1.0, std=0.2)
    return model


def port(reference, config, state):
    unet = UNet(UNetConfig.from_dict(config)).eval()
    unet.load_state_dict(reference.state_dict())
    if state != "loaded":
        unet.prepare_for_inference(channels_last=state == "channels_last")
    return unet


def random_inputs(config, *, height, width):
    """A batch of three rows that stand at different steps."""
    generator = torch.Generator().manual_seed(height * 100 + width)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    inputs = {
        "sample": normal(3, 4, height, width),
        "timesteps": torch.tensor([1.0, 441.5, 981.0]),
        "prompt_embeds": normal(3, 11, config["cross_attention_dim"]),
    }
    if "addition_embed_type" in config:
        ids = (config["projection_class_embeddings_input_dim"] - 40) // 16
        inputs["text_embeds"] = normal(3, 40)
        inputs["time_ids"] = torch.randint(0, 1024, (3, ids), generator=generator).float()
    return inputs


def run_reference(reference, inputs):
    added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
    with torch.no_grad():
        return reference(
            inputs["sample"],
            inputs["timesteps"],
            inputs["prompt_embeds"],
            added_cond_kwargs=added or None,
        ).sample


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", CONFIGS)
def test_unet_equals_diffusers(references, name, size, state):
    inputs = random_inputs(CONFIGS[name], height=size[0], width=size[1])
    expected = run_reference(references[name], inputs)
    unet = port(references[name], CONFIGS[name], state)
    with torch.no_grad():
        actual = unet(**inputs)
    assert expected.std() > 0.1
    assert relative_error(actual, expected) <= 1e-5


@pytest.mark.parametrize("timesteps", [torch.tensor([3, 500, 999]), torch.tensor([7, 7, 7])])
def test_integer_timesteps_equal_diffusers(references, timesteps):
    inputs = random_inputs(SD21, height=8, width=8) | {"timesteps": timesteps}
    expected = run_reference(references["sd21"], inputs)
    with torch.no_grad():
        actual = port(references["sd21"], SD21, "loaded")(**inputs)
    assert relative_error(actual, expected) <= 1e-5


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_names_and_shapes_equal_diffusers(name):
    config, num_tensors, num_parameters = FULL_SIZE[name]
    with torch.device("meta"):
        reference = diffusers.UNet2DConditionModel(**config)
        unet = UNet(UNetConfig.from_dict(config))
    shapes = {key: tensor.shape for key, tensor in unet.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in reference.state_dict().items()}
    assert len(shapes) == num_tensors
    assert sum(shape.numel() for shape in shapes.values()) == num_parameters
    # A saved diffusers config holds every option, also those that these dicts leave out.
    assert UNetConfig.from_dict(reference.config) == unet.config
