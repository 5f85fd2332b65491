"""The LTX-2 transformer: the rules a port gets wrong silently, configuration, contexts, tracing."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from raydiff.errors import ModelError
from raydiff.models.ltx2.adaln import AdaLayerNormSingle
from raydiff.models.ltx2.rope import LatentSize, audio_seconds, rotate, rotations, video_seconds
from raydiff.models.ltx2.transformer import LTX2Transformer
from raydiff.models.ltx2.transformer_block import TransformerBlock
from raydiff.models.ltx2.transformer_config import LTX2TransformerConfig
from tests.relative_error import relative_error

V20 = {
    "in_channels": 6,
    "out_channels": 5,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "audio_in_channels": 4,
    "audio_out_channels": 3,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 2,
    "caption_channels": 10,
    "rope_type": "split",
}
V23 = {
    **V20,
    "gated_attn": True,
    "audio_gated_attn": True,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
}
STATIC_TEXT = {**V23, "use_prompt_adaln_single": False}
REAL = LTX2TransformerConfig.from_dict({"rope_type": "split"})
SIZE = LatentSize(3, 2, 2)
NUM_TOKENS = SIZE.num_frames * SIZE.height * SIZE.width
NUM_AUDIO_TOKENS = 5
CPU = torch.device("cpu")


def random_model(config=V20, seed=3):
    torch.manual_seed(seed)
    model = LTX2Transformer(LTX2TransformerConfig.from_dict(config)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "table" in name:
            parameter.normal_(std=0.5)
        elif parameter.ndim > 1:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
        else:
            parameter.normal_(mean=float("norm" in name), std=0.2)
    return model


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_latents(rows=3, seed=1):
    return normal(rows, NUM_TOKENS, 6, seed=seed), normal(rows, NUM_AUDIO_TOKENS, 4, seed=seed)


def random_context(model, rows=3, *, frame_rates=None, **options):
    config = model.config
    widths = (config.caption_channels or config.dim, config.caption_channels or config.audio_dim)
    return model.precompute_context(
        normal(rows, 7, widths[0], seed=5),
        normal(rows, 7, widths[1], seed=6),
        latent_size=SIZE,
        num_audio_tokens=NUM_AUDIO_TOKENS,
        frame_rates=[24.0] * rows if frame_rates is None else frame_rates,
        **options,
    )


SIGMAS = torch.tensor([0.99, 0.5, 0.1])


def run(model, context=None, **options):
    context = random_context(model) if context is None else context
    return model(*random_latents(), context, **{"sigmas": SIGMAS, **options})


def assert_close(actual, expected, tolerance=1e-6):
    for one, other in zip(actual, expected, strict=True):
        assert relative_error(one, other) <= tolerance


def rms(x):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def block_with(*, config=V23, live=()):
    """A block and its inputs: of its gates, only the (table, row) pairs in `live` are open."""
    model = random_model(config)
    context = random_context(model)
    for module in model.modules():
        if isinstance(module, AdaLayerNormSingle):
            module.linear.weight.zero_()
            module.linear.bias.zero_()
    block = model.transformer_blocks[0]
    for table in (block.scale_shift_table, block.audio_scale_shift_table):
        table[[2, 5, 8]] = 0
    block.video_a2v_cross_attn_scale_shift_table[4] = 0
    block.audio_a2v_cross_attn_scale_shift_table[4] = 0
    for name, row in live:
        getattr(block, name)[row] = 0.7
    step = model.open_step(*random_latents(), context, sigmas=SIGMAS)
    return block, step


# Timesteps, modulation and gates


def test_timesteps_are_1000_sigma_in_256_sinusoids_cosine_first():
    model = random_model()
    adaln = model.time_embed
    context = random_context(model)
    step = model.open_step(*random_latents(), context, sigmas=SIGMAS)
    angles = 1000 * SIGMAS[:, None] * 10_000 ** (-torch.arange(128) / 128)
    sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
    embedder = adaln.emb.timestep_embedder
    embedded = embedder.linear_2(F.silu(embedder.linear_1(sinusoids)))
    values = adaln.linear(F.silu(embedded)).unflatten(-1, (6, 32))
    assert relative_error(step.video_embedded[:, 0], embedded) <= 1e-4
    assert relative_error(step.block_step.video.modulation[:, 0], values) <= 1e-4


@pytest.mark.parametrize(
    ("row", "layer"), [(0, "self attention"), (3, "feed-forward"), (6, "text attention")]
)
@pytest.mark.parametrize("stream", ["video", "audio"])
def test_modulation_is_shift_scale_gate_of_self_attention_feed_forward_and_text(stream, row, layer):
    prefix = "" if stream == "video" else "audio_"
    block, step = block_with(live=[(f"{prefix}scale_shift_table", row + 2)])
    table = getattr(block, f"{prefix}scale_shift_table")
    x = getattr(step, stream)
    layer_input = rms(x) * (1 + table[row + 1]) + table[row]
    stream_step = getattr(step.block_step, stream)
    if layer == "self attention":
        update = getattr(block, f"{prefix}attn1")(layer_input, stream_step.rotation)
    elif layer == "feed-forward":
        update = getattr(block, f"{prefix}ff")(layer_input)
    else:
        # Of the prompt's table the shift comes first too.
        shift, scale = getattr(block, f"{prefix}prompt_scale_shift_table")
        attention = getattr(block, f"{prefix}attn2")
        keys_values = attention.keys_values(stream_step.text * (1 + scale) + shift)
        update = attention(layer_input, keys_values)
    actual = dict(
        zip(("video", "audio"), block(step.video, step.audio, step.block_step), strict=True)
    )
    assert relative_error(actual[stream] - x, 0.7 * update) <= 1e-5
    other = "audio" if stream == "video" else "video"
    assert torch.equal(actual[other], getattr(step, other))


def test_text_keys_and_values_see_the_rows_sigma_not_the_tokens():
    model = random_model(V23)
    frame_sigmas = SIGMAS[:, None] * torch.tensor([0.0, 1.0, 1.0])
    plain = model.open_step(*random_latents(), random_context(model), sigmas=SIGMAS)
    with_image = model.open_step(
        *random_latents(), random_context(model), sigmas=SIGMAS, video_sigmas=frame_sigmas
    )
    expected = plain.block_step.video.text_modulation
    assert expected.shape == (3, 1, 2, 32)
    assert torch.equal(with_image.block_step.video.text_modulation, expected)
    assert with_image.block_step.video.modulation.shape == (3, 3, 9, 32)


@pytest.mark.parametrize("receiver", ["video", "audio"])
def test_tables_across_have_scale_before_shift(receiver):
    table = f"{receiver}_a2v_cross_attn_scale_shift_table"
    block, step = block_with(live=[(table, 4)])
    first = 0 if receiver == "video" else 2
    inputs = {}
    for stream in ("video", "audio"):
        rows = getattr(block, f"{stream}_a2v_cross_attn_scale_shift_table")
        inputs[stream] = rms(getattr(step, stream)) * (1 + rows[first]) + rows[first + 1]
    across = step.block_step.across
    if receiver == "video":
        update = block.audio_to_video_attn(
            inputs["video"], inputs["audio"], across.video_rotation, across.audio_rotation
        )
    else:
        update = block.video_to_audio_attn(
            inputs["audio"], inputs["video"], across.audio_rotation, across.video_rotation
        )
    video, audio = block(step.video, step.audio, step.block_step)
    changed = video - step.video if receiver == "video" else audio - step.audio
    assert relative_error(changed, 0.7 * update) <= 1e-5


def test_gates_across_see_sigma_times_their_own_multiplier():
    config = {**V20, "cross_attn_timestep_scale_multiplier": 10}
    model, usual = random_model(config), random_model()
    step = model.open_step(*random_latents(), random_context(model), sigmas=SIGMAS)
    expected, _ = model.av_cross_attn_video_a2v_gate(SIGMAS[:, None] * 10)
    assert relative_error(step.block_step.across.video_gate, expected) <= 1e-3
    other = usual.open_step(*random_latents(), random_context(usual), sigmas=SIGMAS)
    across, usual_across = step.block_step.across, other.block_step.across
    assert torch.equal(across.video_modulation, usual_across.video_modulation)
    assert not torch.allclose(across.audio_gate, usual_across.audio_gate)


def test_both_streams_take_from_what_the_other_was_before():
    open_gates = [(f"{name}_a2v_cross_attn_scale_shift_table", 4) for name in ("video", "audio")]
    block, step = block_with(live=open_gates)
    video, audio = block(step.video, step.audio, step.block_step)
    block.audio_to_video_attn.to_out[0].weight.mul_(3)
    louder_video, same_audio = block(step.video, step.audio, step.block_step)
    assert torch.equal(same_audio, audio)
    assert not torch.allclose(louder_video, video)
    block.video_to_audio_attn.to_out[0].weight.mul_(3)
    same_video, louder_audio = block(step.video, step.audio, step.block_step)
    assert torch.equal(same_video, louder_video)
    assert not torch.allclose(louder_audio, audio)


def test_layers_run_in_order_self_text_across_feed_forward():
    """Each layer changes what every later one sees, and nothing that an earlier one saw."""
    order = ["attn1", "attn2", "audio_to_video_attn", "ff"]
    model = random_model(V23)
    step = model.open_step(*random_latents(), random_context(model), sigmas=SIGMAS)
    block = model.transformer_blocks[0]
    seen = {}
    for name in order:
        block.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: seen.update({name: arguments[0].clone()})
        )
    block(step.video, step.audio, step.block_step)
    before = dict(seen)
    for position, name in enumerate(order):
        for weight in block.get_submodule(name).parameters():
            weight.mul_(2)
        block(step.video, step.audio, step.block_step)
        changed = [other for other in order if not torch.allclose(seen[other], before[other])]
        assert changed == order[position + 1 :]
        for weight in block.get_submodule(name).parameters():
            weight.div_(2)


def test_head_gates_are_twice_the_sigmoid_of_a_projection_of_the_attention_input():
    model = random_model(V23)
    attention = model.transformer_blocks[0].attn1
    rotation = random_context(model).rotations.video
    x = normal(2, NUM_TOKENS, 32)
    gates = 2 * torch.sigmoid(attention.to_gate_logits(x))  # (B, N, heads)
    seen = {}
    attention.to_out[0].register_forward_pre_hook(lambda _, a: seen.update(gated=a[0]))
    attention(x, rotation)
    gate_layer, attention.to_gate_logits = attention.to_gate_logits, None
    gated = seen["gated"].unflatten(-1, (2, 16))
    attention(x, rotation)
    plain = seen["gated"].unflatten(-1, (2, 16))
    assert relative_error(gated, plain * gates[..., None]) <= 1e-6
    assert gate_layer.out_features == 2


def test_queries_and_keys_are_normalised_over_all_heads_together():
    attention = random_model().transformer_blocks[0].attn2
    assert attention.norm_q.weight.shape == (32,)
    text = normal(1, 4, 32)
    keys = attention.keys_values(text)[..., :32]
    assert relative_error(keys, rms(attention.to_k(text)) * attention.norm_k.weight) <= 1e-6


def test_output_is_layer_normed_and_modulated_by_table_plus_embedded_timestep():
    model = random_model()
    step = model.open_step(*random_latents(), random_context(model), sigmas=SIGMAS)
    shift, scale = (model.scale_shift_table + step.video_embedded).unbind(1)
    mean, variance = step.video.mean(-1, True), step.video.var(-1, correction=0, keepdim=True)
    normed = (step.video - mean) / (variance + 1e-6).sqrt()
    expected = model.proj_out(normed * (1 + scale[:, None]) + shift[:, None])
    assert relative_error(model.close_step(step).video, expected) <= 1e-5


# Positions


def test_video_positions_are_the_middles_of_causal_frames_in_seconds():
    seconds = video_seconds(REAL, 4, torch.tensor([24.0, 50.0]))
    middles = torch.tensor([0.5, 5.0, 13.0, 21.0])  # the first latent frame is one pixel frame
    torch.testing.assert_close(seconds, torch.stack([middles / 24, middles / 50]))


def test_audio_positions_are_the_middles_of_causal_mel_frames_in_seconds():
    seconds = audio_seconds(REAL, 4, CPU)
    torch.testing.assert_close(seconds, torch.tensor([0.005, 0.03, 0.07, 0.11]))


def test_rope_is_padded_at_the_front():
    """2048 slots hold 3 * 682 frequencies: the first two pairs of channels never turn."""
    video = rotations(REAL, LatentSize(3, 2, 2), 4, [24.0], CPU).video
    assert video.cos.shape == (1, 12, 32, 64)
    angles = torch.atan2(video.sin, video.cos).flatten(2)[0]  # (N, 2048)
    assert (angles[:, :2] == 0).all()
    assert (angles[:, 2:8] != 0).all()


def test_rope_frequencies_go_through_time_height_and_width_in_turn():
    rotation = rotations(REAL, LatentSize(3, 2, 4), 4, [24.0], CPU).video
    slots = torch.atan2(rotation.sin, rotation.cos)[0].flatten(1).unflatten(0, (3, 2, 4))
    varies = [slots.std(dim=axis).amax(dim=(0, 1)) > 0 for axis in range(3)]  # (2048,) each
    for axis in range(3):
        expected = torch.arange(2046) % 3 == axis
        assert torch.equal(varies[axis][2:], expected)


def test_rope_spans_20_seconds_and_2048_pixels_from_minus_one_to_one():
    size = LatentSize(1, 1, 1)
    rotation = rotations(REAL, size, 1, [25.0], CPU).video
    lowest = torch.atan2(rotation.sin, rotation.cos).flatten()[2:5] / (torch.pi / 2)
    expected = [0.5 / 25 / 20 * 2 - 1, 16 / 2048 * 2 - 1, 16 / 2048 * 2 - 1]
    torch.testing.assert_close(lowest, torch.tensor(expected))


def test_every_head_has_its_own_frequencies():
    rotation = rotations(REAL, SIZE, 4, [24.0], CPU).video
    first, *others = rotation.cos.unbind(2)
    assert not any(torch.equal(first, other) for other in others)


def test_rope_frequencies_are_rounded_from_double_precision():
    single = LTX2TransformerConfig.from_dict({"rope_type": "split", "rope_double_precision": False})
    exact = rotations(REAL, SIZE, 4, [24.0], CPU).audio
    rounded = rotations(single, SIZE, 4, [24.0], CPU).audio
    assert exact.cos.dtype == torch.float32
    assert not torch.equal(exact.cos, rounded.cos)
    frequencies = 10_000 ** torch.linspace(0, 1, 1024, dtype=torch.float64) * torch.pi / 2
    angles = (audio_seconds(REAL, 4, CPU) / 20)[:, None] * 2 - 1
    angles = angles * frequencies.float()
    assert torch.equal(exact.cos[0].flatten(1), angles.cos())


def test_split_rope_turns_halves_and_interleaved_turns_neighbours():
    angle = normal(1, 3, 2, 4)
    rotation = type(rotations(REAL, SIZE, 1, [24.0], CPU).video)(angle.cos(), angle.sin())
    x = normal(1, 3, 2, 8, seed=1)
    turned = torch.view_as_complex(torch.stack([x[..., :4], x[..., 4:]], -1)) * torch.exp(
        1j * angle
    )
    split = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(rotate(x, rotation, "split"), split)
    pairs = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.exp(1j * angle)
    interleaved = torch.view_as_real(pairs).flatten(-2)
    torch.testing.assert_close(rotate(x, rotation, "interleaved"), interleaved)


def test_attention_across_knows_time_alone():
    both = rotations(REAL, LatentSize(3, 2, 4), 6, [24.0], CPU)
    assert both.video_across.cos.shape == (1, 24, 32, 32)
    assert both.audio_across.cos.shape == (1, 6, 32, 32)
    frames = both.video_across.cos[0].unflatten(0, (3, 8))
    assert torch.equal(frames, frames[:, :1].expand_as(frames))
    assert not torch.equal(frames[0], frames[1])


def test_frame_rate_is_part_of_the_conditioning():
    model = random_model()
    slow = run(model, random_context(model, frame_rates=[8.0] * 3))
    assert relative_error(run(model).video, slow.video) > 1e-3


# Conditioning


def test_tokens_of_a_given_first_frame_have_timestep_zero():
    model = random_model()
    frame_sigmas = SIGMAS[:, None] * torch.tensor([0.0, 1.0, 1.0])
    by_frame = run(model, video_sigmas=frame_sigmas)
    token_sigmas = frame_sigmas.repeat_interleave(SIZE.height * SIZE.width, dim=1)
    assert_close(by_frame, run(model, video_sigmas=token_sigmas), 1e-5)
    everywhere = run(model, video_sigmas=SIGMAS[:, None].expand(-1, 3))
    assert_close(everywhere, run(model), 1e-5)


def test_cross_timestep_matters_only_where_tokens_differ_from_their_row():
    model = random_model()
    frame_sigmas = SIGMAS[:, None] * torch.tensor([0.0, 1.0, 1.0])
    assert_close(run(model, use_cross_timestep=False), run(model, use_cross_timestep=True))
    own, cross = (
        run(model, video_sigmas=frame_sigmas, use_cross_timestep=use) for use in (False, True)
    )
    assert relative_error(own.video, cross.video) > 1e-4


@pytest.mark.parametrize("is_allowed_in_diffusers", [False, True])
def test_perturbed_self_attention_is_its_value_projection(is_allowed_in_diffusers):
    """Whatever the config's perturbed_attn: without it, diffusers leaves guidance out silently."""
    model = random_model({**V23, "perturbed_attn": is_allowed_in_diffusers})
    attention = model.transformer_blocks[0].attn1
    rotation = random_context(model).rotations.video
    x = normal(3, NUM_TOKENS, 32)
    actual = attention(x, rotation, torch.tensor([True, False, True]))
    values = attention.to_v(x).unflatten(-1, (2, 16))
    gates = 2 * torch.sigmoid(attention.to_gate_logits(x))
    expected = attention.to_out[0]((values * gates[..., None]).flatten(2))
    assert relative_error(actual[[0, 2]], expected[[0, 2]]) <= 1e-6
    assert relative_error(actual[1:2], attention(x, rotation)[1:2]) <= 1e-6
    assert relative_error(expected[1:2], attention(x, rotation)[1:2]) > 0.1


def test_perturbation_reaches_the_audio_and_only_the_named_blocks():
    seen = []
    model = random_model()
    for block in model.transformer_blocks:
        for attention in (block.attn1, block.audio_attn1):
            attention.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[2]))
    mask = torch.tensor([False, True, True])
    run(model, perturbed={1: mask})
    assert seen[:2] == [None, None]
    assert all(item is mask for item in seen[2:])
    assert len(seen) == 4


def test_rows_apart_do_not_hear_each_other():
    model = random_model()
    context = random_context(model)
    video, audio = random_latents()
    other_audio = audio + normal(*audio.shape, seed=9)
    connected = torch.tensor([2, 0])
    first, second = (
        model(video, sound, context, sigmas=SIGMAS, connected_rows=connected)
        for sound in (audio, other_audio)
    )
    assert torch.equal(first.video[1], second.video[1])
    assert not torch.allclose(first.video[0], second.video[0])
    assert not torch.allclose(first.video[2], second.video[2])


def test_caption_projection_belongs_to_the_transformer_of_2_0_alone():
    names = {name.split(".")[0] for name in random_model().state_dict()}
    assert {"caption_projection", "audio_caption_projection"} <= names
    names_23 = {name.split(".")[0] for name in random_model(V23).state_dict()}
    assert not {name for name in names_23 if "caption" in name}
    model = random_model()
    layer, embeds = model.caption_projection, normal(3, 7, 10, seed=5)
    expected = layer.linear_2(F.gelu(layer.linear_1(embeds), approximate="tanh"))
    torch.testing.assert_close(random_context(model).video_text, expected)


# Contexts, parts and preparation


@pytest.mark.parametrize("config", [V20, V23, STATIC_TEXT], ids=["v20", "v23", "static_text"])
def test_preparation_keeps_the_outputs(config):
    model = random_model(config).double()
    expected = run(model)
    for _ in range(2):  # the second preparation finds nothing left to do
        model.prepare_for_inference()
        assert_close(run(model), expected, 1e-12)
    names = list(model.state_dict())
    assert not [name for name in names if ".to_k." in name or ".to_v." in name]


@pytest.mark.parametrize(
    ("config", "num_kept"), [(V20, 2), (V23, 0), (STATIC_TEXT, 2)], ids=["v20", "v23", "static"]
)
def test_kept_keys_and_values_stand_for_the_text(config, num_kept):
    model = random_model(config)
    context = random_context(model, keeps_keys_values=True)
    assert len(context.keys_values) == num_kept
    index = torch.tensor([2, 0, 2])
    assert_close(run(model, context), run(model))
    assert_close(run(model, context.rows(index)), run(model, random_context(model).rows(index)))


@pytest.mark.parametrize("config", [V20, V23], ids=["v20", "v23"])
def test_rows_of_a_context_are_the_contexts_of_those_rows(config):
    model = random_model(config)
    context = random_context(model, frame_rates=[24.0, 25.0, 8.0])
    video, audio = random_latents()
    whole = model(video, audio, context, sigmas=SIGMAS)
    index = torch.tensor([2, 1])
    chosen = context.rows(torch.tensor([0, 2, 1])).rows(torch.tensor([1, 2]))
    assert chosen.video_text is context.video_text  # texts are pointed to, not copied
    part = model(video[index], audio[index], chosen, sigmas=SIGMAS[index])
    assert_close(part, [stream[index] for stream in whole], 1e-5)


def test_one_frame_rate_for_all_makes_one_row_of_positions():
    model = random_model()
    shared = random_context(model).rotations.video.cos
    assert shared.shape == (1, NUM_TOKENS, 2, 8)
    own = random_context(model, frame_rates=[24.0, 25.0, 24.0]).rotations.video.cos
    assert own.shape == (3, NUM_TOKENS, 2, 8)
    assert torch.equal(own[2], shared[0])


def test_frame_rates_are_as_many_as_rows():
    with pytest.raises(ValueError, match="frame_rates has 2 items"):
        random_context(random_model(), frame_rates=[24.0, 25.0])


def test_keyframe_tokens_need_the_embedding():
    with pytest.raises(ValueError, match=r"2\.5"):
        run(random_model(), keyframe_tokens=torch.ones(3, NUM_TOKENS))


def test_a_block_traces_as_one_graph_for_all_steps():
    """Compiling one block serves all: the pipelines compile block by block."""
    torch._dynamo.reset()
    counter = CompileCounter()
    model = random_model(V23)
    model.prepare_for_inference()
    context = random_context(model).rows(torch.tensor([0, 1, 1]))
    expected = run(model, context)
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, backend=counter, dynamic=False)
    with torch.inference_mode():
        for step in range(2):
            assert_close(run(model, context), expected)
            run(model, context, sigmas=SIGMAS / (step + 2))
    assert counter.frame_count == 1


def test_bfloat16_keeps_neighbouring_sigmas_apart():
    """0.998 and 0.999 are one number in bfloat16: sinusoids are computed before the cast."""
    model = random_model()
    expected = run(model)
    model.to(torch.bfloat16).prepare_for_inference()
    actual = run(model)
    assert actual.video.dtype == torch.bfloat16
    assert relative_error(actual.video.float(), expected.video) < 0.05
    step = model.open_step(
        *random_latents(), random_context(model), sigmas=torch.tensor([0.998, 0.999, 1.0])
    )
    assert not torch.equal(step.video_embedded[0], step.video_embedded[1])


# Configuration


def test_missing_out_channels_are_in_channels():
    config = LTX2TransformerConfig.from_dict(V20 | {"out_channels": None})
    assert config.out_channels == 6


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("patch_size", 2),
        ("qk_norm", "rms_norm"),
        ("activation_fn", "geglu"),
        ("norm_elementwise_affine", True),
        ("attention_bias", False),
        ("rope_type", "rotated"),
        ("audio_gated_attn", True),
        ("cross_attn_mod", True),
        ("cross_attention_dim", 4096),
        ("audio_cross_attention_dim", 32),
        ("attention_head_dim", 15),
        ("num_layers", 0),
        ("num_layers", None),
        ("vae_scale_factors", [8, 32]),
        ("gated_attention", True),
    ],
)
def test_an_option_that_cannot_be_run_is_named(option, value):
    with pytest.raises(ModelError, match=option):
        LTX2TransformerConfig.from_dict(V20 | {option: value})


def test_a_block_is_built_without_the_model():
    """Streaming builds blocks one by one: names within a block are the checkpoint's."""
    config = LTX2TransformerConfig.from_dict(V23)
    with torch.device("meta"):
        names = set(TransformerBlock(config).state_dict())
    prefix = "transformer_blocks.1."
    whole = random_model(V23).state_dict()
    assert names == {name.removeprefix(prefix) for name in whole if name.startswith(prefix)}
