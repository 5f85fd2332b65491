"""The LTX-2 transformer against diffusers' on random weights and inputs, at fp32 and on meta."""

import diffusers
import pytest
import torch

from raydiff.models.ltx2.rope import LatentSize, rotations
from raydiff.models.ltx2.transformer import LTX2Transformer
from raydiff.models.ltx2.transformer_config import LTX2TransformerConfig
from tests.relative_error import relative_error

V20 = {
    "in_channels": 12,
    "out_channels": 10,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "cross_attention_dim": 64,
    "audio_in_channels": 6,
    "audio_out_channels": 7,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 32,
    "num_layers": 3,
    "caption_channels": 20,
    "rope_type": "split",
    "cross_attn_timestep_scale_multiplier": 250,
    "audio_pos_embed_max_pos": 15,
}
INTERLEAVED = {**V20, "rope_type": "interleaved", "rope_double_precision": False}
V23 = {
    **V20,
    "gated_attn": True,
    "audio_gated_attn": True,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
}
V25 = {
    **V23,
    "ff_bias": False,
    "use_keyframes_abs_pos_embedding": True,
    "use_prompt_adaln_single": False,
}
CONFIGS = {"v20": V20, "interleaved": INTERLEAVED, "v23": V23, "v25": V25}
SIZES = [LatentSize(3, 2, 4), LatentSize(1, 3, 3)]
NUM_AUDIO_TOKENS = 9
FRAME_RATES = [24.0, 24.0, 24.0]

REAL_20 = {"rope_type": "split"}
REAL_23 = {
    **REAL_20,
    "gated_attn": True,
    "audio_gated_attn": True,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
}
REAL_25 = {**REAL_23, "ff_bias": False, "use_keyframes_abs_pos_embedding": True}
FULL_SIZE = {
    "v20": (REAL_20, 3510, 18_876_174_592),
    "v23": (REAL_23, 4186, 18_988_838_144),
    "v25": (REAL_25, 4091, 18_987_859_200),
}


@pytest.fixture(scope="module")
def references():
    """diffusers' model of each small config: every norm, gate and table differs from identity."""
    return {name: random_reference(config) for name, config in CONFIGS.items()}


def random_reference(config):
    torch.manual_seed(11)
    model = diffusers.LTX2VideoTransformer3DModel(**config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "table" in name or "keyframes" in name:
            parameter.normal_(std=0.5)
        elif parameter.ndim > 1:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
        else:
            parameter.normal_(mean=float(name.endswith("weight")), std=0.2)
    return model


def port(reference, config, *, is_prepared=False):
    model = LTX2Transformer(LTX2TransformerConfig.from_dict(config)).eval().requires_grad_(False)
    model.load_state_dict(reference.state_dict())
    if is_prepared:
        model.prepare_for_inference()
    return model


def random_inputs(config, size):
    """Three rows at different steps: latents, sigmas and texts."""
    generator = torch.Generator().manual_seed(sum(size))

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    captions = (20, 20) if config.get("use_prompt_embeddings", True) else (64, 32)
    return {
        "video": normal(3, size.num_frames * size.height * size.width, 12),
        "audio": normal(3, NUM_AUDIO_TOKENS, 6),
        "sigmas": torch.tensor([0.9987, 0.421875, 0.1]),
        "video_embeds": normal(3, 5, captions[0]),
        "audio_embeds": normal(3, 5, captions[1]),
    }


def run_reference(reference, inputs, size, **options):
    sigmas = inputs["sigmas"]
    arguments = {
        "timestep": sigmas * 1000,
        "sigma": sigmas * 1000,
        "fps": 24.0,
        "num_frames": size.num_frames,
        "height": size.height,
        "width": size.width,
        "audio_num_frames": NUM_AUDIO_TOKENS,
        "use_cross_timestep": True,
        **options,
    }
    return reference(
        inputs["video"],
        inputs["audio"],
        inputs["video_embeds"],
        inputs["audio_embeds"],
        return_dict=False,
        **arguments,
    )


def run(model, inputs, size, *, frame_rates=FRAME_RATES, keeps_keys_values=False, **options):
    context = model.precompute_context(
        inputs["video_embeds"],
        inputs["audio_embeds"],
        latent_size=size,
        num_audio_tokens=NUM_AUDIO_TOKENS,
        frame_rates=frame_rates,
        keeps_keys_values=keeps_keys_values,
    )
    arguments = {"sigmas": inputs["sigmas"], **options}
    return model(inputs["video"], inputs["audio"], context, **arguments)


def row_of(inputs, row):
    return {name: value[row : row + 1] for name, value in inputs.items()}


def assert_equal(actual, expected):
    for stream, reference in zip(actual, expected, strict=True):
        assert reference.std() > 0.1
        assert relative_error(stream, reference) <= 1e-5


@pytest.mark.parametrize("is_prepared", [False, True], ids=["loaded", "prepared"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("name", CONFIGS)
def test_transformer_equals_diffusers(references, name, size, is_prepared):
    inputs = random_inputs(CONFIGS[name], size)
    model = port(references[name], CONFIGS[name], is_prepared=is_prepared)
    expected = run_reference(references[name], inputs, size)
    assert_equal(run(model, inputs, size), expected)
    assert_equal(run(model, inputs, size, keeps_keys_values=True), expected)


@pytest.mark.parametrize("use_cross_timestep", [False, True])
@pytest.mark.parametrize("name", ["v20", "v23"])
def test_clean_first_frame_has_timestep_zero(references, name, use_cross_timestep):
    """Image to video: the first frame's tokens stand at sigma 0, the row at its own."""
    size = SIZES[0]
    inputs = random_inputs(CONFIGS[name], size)
    sigmas, tokens_per_frame = inputs["sigmas"], size.height * size.width
    is_noisy = torch.tensor([0.0, 1.0, 1.0])
    frame_sigmas = sigmas[:, None] * is_noisy
    token_sigmas = frame_sigmas.repeat_interleave(tokens_per_frame, dim=1)
    expected = run_reference(
        references[name],
        inputs,
        size,
        timestep=token_sigmas * 1000,
        audio_timestep=sigmas * 1000,
        use_cross_timestep=use_cross_timestep,
    )
    model = port(references[name], CONFIGS[name])
    options = {"use_cross_timestep": use_cross_timestep}
    assert_equal(run(model, inputs, size, video_sigmas=token_sigmas, **options), expected)
    assert_equal(run(model, inputs, size, video_sigmas=frame_sigmas, **options), expected)
    not_clean = run(model, inputs, size, **options)
    assert relative_error(not_clean.video, expected[0]) > 1e-2


@pytest.mark.parametrize("use_cross_timestep", [False, True])
def test_audio_tokens_have_timesteps_too(references, use_cross_timestep):
    size = SIZES[0]
    inputs = random_inputs(V23, size)
    audio_sigmas = torch.rand(3, NUM_AUDIO_TOKENS, generator=torch.Generator().manual_seed(2))
    expected = run_reference(
        references["v23"],
        inputs,
        size,
        audio_timestep=audio_sigmas * 1000,
        use_cross_timestep=use_cross_timestep,
    )
    actual = run(
        port(references["v23"], V23),
        inputs,
        size,
        audio_sigmas=audio_sigmas,
        use_cross_timestep=use_cross_timestep,
    )
    assert_equal(actual, expected)


def test_rows_may_differ_in_frame_rate(references):
    size, frame_rates = SIZES[0], [24.0, 29.97, 8.0]
    inputs = random_inputs(V20, size)
    actual = run(port(references["v20"], V20), inputs, size, frame_rates=frame_rates)
    for row, frame_rate in enumerate(frame_rates):
        expected = run_reference(references["v20"], row_of(inputs, row), size, fps=frame_rate)
        assert_equal([stream[row : row + 1] for stream in actual], expected)


def test_rows_may_differ_in_guidance(references):
    """One batch: a plain row, one whose self attentions are left out, one with streams apart."""
    size = SIZES[0]
    inputs = random_inputs(V23, size)
    variants = [
        {},
        {"spatio_temporal_guidance_blocks": [0, 2]},
        {"isolate_modalities": True, "spatio_temporal_guidance_blocks": [2]},
    ]
    actual = run(
        port(references["v23"], V23),
        inputs,
        size,
        connected_rows=torch.tensor([1, 0]),
        perturbed={
            0: torch.tensor([False, True, False]),
            2: torch.tensor([False, True, True]),
        },
    )
    for row, variant in enumerate(variants):
        expected = run_reference(references["v23"], row_of(inputs, row), size, **variant)
        assert_equal([stream[row : row + 1] for stream in actual], expected)


def test_a_batch_may_have_no_connected_rows(references):
    inputs = random_inputs(V20, SIZES[0])
    expected = run_reference(references["v20"], inputs, SIZES[0], isolate_modalities=True)
    none = torch.empty(0, dtype=torch.int64)
    actual = run(port(references["v20"], V20), inputs, SIZES[0], connected_rows=none)
    assert_equal(actual, expected)


def test_keyframe_tokens_get_their_embedding(references):
    size = SIZES[0]
    inputs = random_inputs(V25, size)
    tokens = torch.zeros(3, inputs["video"].shape[1], dtype=torch.bool)
    tokens[:, : size.height * size.width] = True
    expected = run_reference(
        references["v25"], inputs, size, video_keyframes_mask=tokens[..., None].float()
    )
    assert_equal(run(port(references["v25"], V25), inputs, size, keyframe_tokens=tokens), expected)


@pytest.mark.parametrize("frame_rate", [24.0, 23.976, 60.0])
def test_full_size_rotations_equal_diffusers(frame_rate):
    """At full width the highest frequencies turn 15,708 radians: every rounding must agree."""
    size, num_audio_tokens = LatentSize(16, 5, 7), 126
    with torch.device("meta"):
        reference = diffusers.LTX2VideoTransformer3DModel(**(REAL_20 | {"num_layers": 1}))
    config = LTX2TransformerConfig.from_dict(REAL_20)
    actual = rotations(config, size, num_audio_tokens, [frame_rate], torch.device("cpu"))
    cpu = torch.device("cpu")
    video = reference.rope.prepare_video_coords(1, *size, cpu, fps=frame_rate)
    audio = reference.audio_rope.prepare_audio_coords(1, num_audio_tokens, cpu)
    expected = [
        reference.rope(video),
        reference.audio_rope(audio),
        reference.cross_attn_rope(video[:, :1]),
        reference.cross_attn_audio_rope(audio[:, :1]),
    ]
    for rotation, (cos, sin) in zip(actual, expected, strict=True):
        assert torch.equal(rotation.cos, cos.transpose(1, 2))
        assert torch.equal(rotation.sin, sin.transpose(1, 2))


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_names_and_shapes_equal_diffusers(name):
    config, num_tensors, num_parameters = FULL_SIZE[name]
    with torch.device("meta"):
        reference = diffusers.LTX2VideoTransformer3DModel(**config)
        model = LTX2Transformer(LTX2TransformerConfig.from_dict(config))
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in reference.state_dict().items()}
    assert len(shapes) == num_tensors
    assert sum(shape.numel() for shape in shapes.values()) == num_parameters
    # A saved diffusers config holds every option, also those that these dicts leave out.
    assert LTX2TransformerConfig.from_dict(reference.config) == model.config
