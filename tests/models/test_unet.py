"""UNet: configuration, preparation for inference, contexts, rows and tracing."""

import diffusers
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from raydiff.errors import ModelError
from raydiff.models.unet import UNet, UNetConfig, UNetContext, sinusoidal_embedding
from tests.relative_error import relative_error

CONFIG = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
CONV_CONFIG = {**CONFIG, "use_linear_projection": False}


def random_unet(config=CONFIG):
    torch.manual_seed(3)
    unet = UNet(UNetConfig.from_dict(config)).eval().requires_grad_(False)
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(mean=float("norm" in name and "weight" in name), std=0.2)
    return unet


def random_prompt(rows, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(rows, 7, 24, generator=generator),
        "text_embeds": torch.randn(rows, 20, generator=generator),
        "time_ids": torch.randint(0, 1024, (rows, 6), generator=generator).float(),
    }


def random_latents(rows, *, height=9, width=13, seed=1):
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(rows, 4, height, width, generator=generator)
    return sample, torch.rand(rows, generator=generator) * 999


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("config", [CONFIG, CONV_CONFIG], ids=["linear", "conv"])
def test_preparation_keeps_the_outputs(config, channels_last, dtype, tolerance):
    unet, latents, prompt = random_unet(config).to(dtype), random_latents(3), random_prompt(3)
    expected = unet(*latents, **prompt)
    for _ in range(2):  # the second preparation finds nothing left to do
        unet.prepare_for_inference(channels_last=channels_last)
        actual = unet(*latents, **prompt)
        assert actual.dtype == dtype
        assert relative_error(actual, expected) <= tolerance


def test_preparation_drops_the_fused_parameters():
    unet = random_unet()
    before = sum(parameter.numel() for parameter in unet.parameters())
    folded = sum(
        bias.numel()
        for name, bias in unet.named_parameters()
        if name.endswith("conv1.bias")
        or (
            name.endswith("conv2.bias")
            and name.replace("conv2", "conv_shortcut") in unet.state_dict()
        )
    )
    unet.prepare_for_inference(channels_last=True)
    names = [name for name, _ in unet.named_parameters()]
    assert not [name for name in names if ".to_k." in name or ".to_v." in name]
    assert not [name for name in names if ".attn1.to_q." in name]
    assert sum(parameter.numel() for parameter in unet.parameters()) == before - folded
    assert not any(parameter.requires_grad for parameter in unet.parameters())


def test_channels_last_forward_copies_no_map():
    """Tokens, heads and fused projections are views; only the new sample changes its layout."""

    class Copies(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.found = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in ("clone", "copy_", "_to_copy", "contiguous"):
                self.found.append((func, tuple(args[0].shape)))
            return func(*args, **(kwargs or {}))

    unet = random_unet()
    unet.prepare_for_inference(channels_last=True)
    sample, timesteps = random_latents(2)
    context = unet.precompute_context(**random_prompt(2))
    with Copies() as copies:
        output = unet(sample, timesteps, context)
    assert [shape for _, shape in copies.found] == [tuple(sample.shape)]
    assert output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("prepared", [False, True])
def test_context_stands_for_the_prompt(prepared):
    unet, latents, prompt = random_unet(), random_latents(3), random_prompt(3)
    if prepared:
        unet.prepare_for_inference(channels_last=False)
    context = unet.precompute_context(**prompt)
    assert len(context.keys_values) == 4 + 2 + 6
    assert torch.equal(unet(*latents, context), unet(*latents, **prompt))


def test_rows_of_a_context_are_the_contexts_of_those_rows():
    unet, prompt = random_unet(), random_prompt(4)
    unet.prepare_for_inference(channels_last=True)
    index = torch.tensor([3, 0, 0])
    chosen = unet.precompute_context(**prompt).rows(index)
    expected = unet.precompute_context(**{name: value[index] for name, value in prompt.items()})
    torch.testing.assert_close(chosen, expected, rtol=1e-5, atol=1e-6)
    assert [item.stride() for item in chosen.keys_values] == [
        item.stride() for item in expected.keys_values
    ]


def test_a_row_does_not_depend_on_the_other_rows():
    unet = random_unet()
    sample, timesteps = random_latents(3)
    context = unet.precompute_context(**random_prompt(3))
    together = unet(sample, timesteps, context)
    for row in range(3):
        index = torch.tensor([row])
        alone = unet(sample[index], timesteps[index], context.rows(index))
        assert relative_error(together[index], alone) <= 1e-5
    assert relative_error(together, unet(sample, timesteps.flip(0), context)) > 1e-2


def test_forward_traces_as_one_graph_for_all_timesteps():
    torch._dynamo.reset()
    counter = CompileCounter()
    unet = random_unet()
    unet.prepare_for_inference(channels_last=True)
    compiled = torch.compile(unet, fullgraph=True, backend=counter, dynamic=False)
    context = unet.precompute_context(**random_prompt(4))
    for step in range(4):
        sample, timesteps = random_latents(3, seed=step)
        rows = context.rows(torch.tensor([step, 0, 2]))
        with torch.inference_mode():
            actual = compiled(sample, timesteps, rows)
        assert relative_error(actual, unet(sample, timesteps, rows)) <= 1e-6
    assert counter.frame_count == 1


def test_bfloat16_keeps_neighbouring_timesteps_apart():
    """998 and 999 are one number in bfloat16: the embedding must be computed before the cast."""
    unet, (sample, _), prompt = random_unet(), random_latents(2), random_prompt(1)
    prompt = {name: value.expand(2, *value.shape[1:]) for name, value in prompt.items()}
    sample = sample[:1].expand(2, -1, -1, -1)
    timesteps = torch.tensor([998.0, 999.0])
    expected = unet(sample, timesteps, **prompt)
    unet.to(torch.bfloat16).prepare_for_inference(channels_last=True)
    actual = unet(sample, timesteps, **prompt)
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual.float(), expected) < 0.05
    assert not torch.equal(actual[0], actual[1])


def test_sinusoidal_embedding_is_cosine_first_in_float32():
    embedding = sinusoidal_embedding(torch.tensor([0, 3]), 8)
    assert embedding.dtype == torch.float32
    torch.testing.assert_close(embedding[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    assert embedding[1, 0] == torch.tensor(3.0).cos()
    assert embedding[1, 7] == pytest.approx(0.003, rel=1e-4)  # frequency 10_000 ** (-3/4)


def test_missing_conditioning_is_named():
    unet, latents, prompt = random_unet(), random_latents(1), random_prompt(1)
    with pytest.raises(ValueError, match="prompt_embeds"):
        unet(*latents)
    with pytest.raises(ValueError, match="time_ids"):
        unet(*latents, prompt_embeds=prompt["prompt_embeds"])


def test_a_saved_diffusers_config_is_read_whole():
    with torch.device("meta"):
        saved = dict(diffusers.UNet2DConditionModel(**CONFIG).config)
    assert UNetConfig.from_dict(saved) == UNetConfig.from_dict(CONFIG)


def test_numbers_stand_for_all_levels():
    config = UNetConfig.from_dict(
        CONFIG
        | {
            "attention_head_dim": 4,
            "transformer_layers_per_block": 3,
            "layers_per_block": [1, 1],
            "only_cross_attention": [False, False],
        }
    )
    assert config.num_heads == (4, 4)
    assert config.transformer_layers == (3, 3)
    assert config.layers_per_block == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("only_cross_attention", True),
        ("only_cross_attention", [False, True]),
        ("dual_cross_attention", True),
        ("num_attention_heads", 8),
        ("num_class_embeds", 1000),
        ("class_embed_type", "projection"),
        ("addition_embed_type", "image"),
        ("time_cond_proj_dim", 256),
        ("encoder_hid_dim_type", "text_proj"),
        ("flip_sin_to_cos", False),
        ("resnet_time_scale_shift", "scale_shift"),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("down_block_types", ["DownBlock2D", "AttnDownBlock2D"]),
        ("up_block_types", ["UpBlock2D", "CrossAttnUpBlock2D"]),
        ("attention_head_dim", [2, 4, 8]),
        ("attention_head_dim", 5),
        ("transformer_layers_per_block", [1, [1, 2]]),
        ("layers_per_block", [1, 2]),
        ("cross_attention_dim", [24, 48]),
        ("norm_num_groups", 24),
        ("norm_num_groups", None),
        ("addition_time_embed_dim", None),
        ("cross_attention_dims", 24),
    ],
)
def test_an_option_that_cannot_be_run_is_named(option, value):
    with pytest.raises(ModelError, match=option):
        UNetConfig.from_dict(CONFIG | {option: value})


def test_contexts_are_plain_tuples():
    """torch.compile and pickling see nothing but a tuple of tensors."""
    context = random_unet().precompute_context(**random_prompt(2))
    assert isinstance(context, tuple)
    assert UNetContext(*context) == context
