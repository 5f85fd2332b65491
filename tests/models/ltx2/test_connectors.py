"""LTX-2's text connectors: the rules of registers and normalisation, one by one, and configs."""

import pytest
import torch

from raydiff.errors import ModelError
from raydiff.models.ltx2.connectors import LTX2Connectors, LTX2ConnectorsConfig, TextEmbeds

REAL_20 = {
    "_class_name": "LTX2TextConnectors",
    "_diffusers_version": "0.37.0.dev0",
    "audio_connector_attention_head_dim": 128,
    "audio_connector_num_attention_heads": 30,
    "audio_connector_num_layers": 2,
    "audio_connector_num_learnable_registers": 128,
    "caption_channels": 3840,
    "causal_temporal_positioning": False,
    "connector_rope_base_seq_len": 4096,
    "rope_double_precision": True,
    "rope_theta": 10000.0,
    "rope_type": "split",
    "text_proj_in_factor": 49,
    "video_connector_attention_head_dim": 128,
    "video_connector_num_attention_heads": 30,
    "video_connector_num_layers": 2,
    "video_connector_num_learnable_registers": 128,
}
TINY_20 = {
    **REAL_20,
    "caption_channels": 16,
    "text_proj_in_factor": 3,
    "video_connector_num_attention_heads": 2,
    "video_connector_attention_head_dim": 8,
    "video_connector_num_learnable_registers": 4,
    "audio_connector_num_attention_heads": 4,
    "audio_connector_attention_head_dim": 4,
    "audio_connector_num_learnable_registers": 4,
}
TINY_23 = {
    **TINY_20,
    "per_modality_projections": True,
    "proj_bias": True,
    "video_hidden_dim": 32,
    "video_connector_num_attention_heads": 4,
    "video_gated_attn": True,
    "audio_hidden_dim": 8,
    "audio_connector_num_attention_heads": 2,
    "audio_gated_attn": True,
}


def test_real_config():
    config = LTX2ConnectorsConfig.from_dict(REAL_20)
    assert config.video == config.audio
    assert (config.video.num_heads, config.video.head_dim, config.video.dim) == (30, 128, 3840)
    assert (config.video.num_layers, config.video.num_registers) == (2, 128)
    assert (config.hidden_size, config.num_hidden_states) == (3840, 49)
    assert (config.rope_type, config.rope_base_length) == ("split", 4096)
    assert not config.has_projection_for_each


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "LTXTextConnectors"}, "_class_name is 'LTXTextConnectors'"),
        ({"rope_type": "axial"}, "rope_type is 'axial'; only 'split' or 'interleaved'"),
        ({"video_gated_atn": True}, "video_gated_atn is not an option.*video_gated_attn"),
        ({"video_connector_num_learnable_registers": None}, "registers is None; expected a pos"),
        ({"audio_connector_num_layers": 0}, "audio_connector_num_layers is 0; expected a pos"),
        ({"audio_connector_num_attention_heads": 29}, "caption_channels is 3840; .* 29 heads"),
        (
            {"per_modality_projections": True},
            "video_hidden_dim is 4096; .* video connector, 30 heads of 128",
        ),
    ],
)
def test_configs_that_are_refused(change, words):
    with pytest.raises(ModelError, match=words):
        LTX2ConnectorsConfig.from_dict({**REAL_20, **change})


def test_odd_heads_are_refused():
    with pytest.raises(ModelError, match="video_connector_attention_head_dim is 1; it must be ev"):
        LTX2ConnectorsConfig.from_dict(
            {
                **TINY_20,
                "video_connector_num_attention_heads": 16,
                "video_connector_attention_head_dim": 1,
            }
        )


def test_normalisation_of_20_is_by_prompt_and_layer():
    """A layer's scale or mean, another prompt of the batch, what stands at padding: no matter."""
    connectors = build(TINY_20)
    states, mask = random_prompts([8, 3])
    packed = connectors.pack(states, mask)
    moved = states * torch.tensor([1.0, 50.0, 0.02])[:, None, None] + 7
    assert torch.allclose(connectors.pack(moved, mask), packed, atol=1e-3)
    alone = connectors.pack(states[1:, :, -3:], mask[1:, -3:])
    assert torch.allclose(alone, packed[1:, -3:], atol=1e-6)
    other = torch.where(mask[:, None, :, None], states, 1e4)
    assert torch.equal(connectors.pack(other, mask), packed)
    layers = packed.unflatten(2, (16, 3))[1, -3:]  # (S, C, L)
    width = layers.amax(dim=(0, 1)) - layers.amin(dim=(0, 1))
    assert torch.allclose(width, torch.full((3,), 8.0), atol=1e-4)


def test_normalisation_of_23_is_by_token_and_layer():
    connectors = build(TINY_23)
    states, mask = random_prompts([8, 3])
    packed = connectors.pack(states, mask)
    scales = torch.rand(2, 3, 8, 1) + 1
    assert torch.allclose(connectors.pack(states * scales, mask), packed, atol=1e-4)
    layers = packed.unflatten(2, (16, 3))[1]  # (S, C, L)
    assert torch.allclose(layers[-3:].pow(2).mean(dim=1), torch.ones(3, 3), atol=1e-4)
    assert (layers[:-3] == 0).all()


def test_projections_of_23_scale_by_the_root_of_the_widths_and_add_biases():
    connectors = build(TINY_23)
    states, mask = random_prompts([8, 3])
    packed = connectors.pack(states, mask)
    features = connectors.project(states, mask)
    for out, layer, width in (
        (features.video, connectors.video_text_proj_in, 32),
        (features.audio, connectors.audio_text_proj_in, 8),
    ):
        expected = packed * (width / 16) ** 0.5 @ layer.weight.T + layer.bias
        assert torch.allclose(out, expected, atol=1e-5)
    assert features.video.shape == (2, 8, 32)
    assert features.audio.shape == (2, 8, 8)


def test_both_streams_of_20_share_a_projection_as_wide_as_the_text_encoder():
    """What follows in LTX-2.0, the caption projection, belongs to the transformer."""
    connectors = build(TINY_20)
    states, mask = random_prompts([8, 3])
    features = connectors.project(states, mask)
    assert features.video is features.audio
    assert features.video.shape == (2, 8, 16)
    assert not any("caption" in name for name in connectors.state_dict())


@pytest.mark.parametrize("options", [TINY_20, TINY_23], ids=["v20", "v23"])
def test_tokens_go_to_the_front_in_their_order_and_registers_follow(options):
    """Seen with blocks that add nothing: what is left is the final norm, which has no weight."""
    connectors = without_blocks(build(options))
    _, mask = random_prompts([8, 3, 0])
    video = torch.randn(3, 8, connectors.config.video.dim)
    audio = torch.randn(3, 8, connectors.config.audio.dim)
    embeds = connectors.connect(TextEmbeds(video, audio), mask, 12)
    for out, features, connector in (
        (embeds.video, video, connectors.video_connector),
        (embeds.audio, audio, connectors.audio_connector),
    ):
        for row, length in enumerate((8, 3, 0)):
            expected = connector.learnable_registers.repeat(3, 1)
            expected[:length] = features[row, 8 - length :]
            expected = expected / expected.pow(2).mean(dim=-1, keepdim=True).add(1e-6).sqrt()
            assert torch.allclose(out[row], expected, atol=1e-5)


@pytest.mark.parametrize("options", [TINY_20, TINY_23], ids=["v20", "v23"])
def test_every_embedding_counts_after_the_registers(options):
    """No token is masked: a change of the last register reaches the first token."""
    connectors = build(options)
    states, mask = random_prompts([8, 3])
    before = connectors(states, mask, 12)
    connectors.video_connector.learnable_registers[3] += 1
    connectors.audio_connector.learnable_registers[3] += 1
    after = connectors(states, mask, 12)
    for old, new in zip(before, after, strict=True):
        assert ((new - old).abs().amax(dim=-1) > 1e-5).all()


@pytest.mark.parametrize("options", [TINY_20, TINY_23], ids=["v20", "v23"])
def test_positions_are_fractions_of_the_base_length(options):
    """Embeddings depend on the base length, so not on token distances in tokens alone."""
    states, mask = random_prompts([8, 3])
    short = build({**options, "connector_rope_base_seq_len": 12})(states, mask, 12)
    long = build(options)(states, mask, 12)
    for one, other in zip(short, long, strict=True):
        assert (one - other).norm() / other.norm() > 1e-2


@pytest.mark.parametrize("num_embeds", [10, 4])
def test_lengths_that_registers_do_not_fill_are_refused(num_embeds):
    connectors = build(TINY_20)
    states, mask = random_prompts([8, 3])
    words = f"{num_embeds} embeddings of 8 tokens; .* multiple of the 4 registers"
    with pytest.raises(ModelError, match=words):
        connectors(states, mask, num_embeds)


@pytest.mark.parametrize("options", [TINY_20, TINY_23], ids=["v20", "v23"])
def test_rows_do_not_depend_on_the_batch(options):
    connectors = build(options)
    states, mask = random_prompts([8, 3, 1])
    together = connectors(states, mask, 8)
    for row, length in enumerate((8, 3, 1)):
        alone = connectors(states[row : row + 1, :, -length:], mask[row : row + 1, -length:], 8)
        assert torch.allclose(alone.video[0], together.video[row], atol=1e-5)
        assert torch.allclose(alone.audio[0], together.audio[row], atol=1e-5)


@pytest.mark.parametrize("options", [TINY_20, TINY_23], ids=["v20", "v23"])
def test_bfloat16_stays_near_float32(options):
    """Normalised in float32, whatever the dtype of the states and of the weights."""
    connectors = build(options)
    states, mask = random_prompts([8, 3])
    states = states.to(torch.bfloat16)
    exact = connectors(states.float(), mask, 8)
    packed = connectors.pack(states.float(), mask)
    connectors = connectors.to(torch.bfloat16)
    assert torch.equal(connectors.pack(states, mask), packed.to(torch.bfloat16))
    connectors.prepare_for_inference()
    rounded = connectors(states, mask, 8)
    for out, expected in zip(rounded, exact, strict=True):
        assert out.dtype == torch.bfloat16
        assert (out.float() - expected).norm() / expected.norm() < 2e-2
    assert not any(parameter.requires_grad for parameter in connectors.parameters())


def test_compiles_to_one_graph():
    connectors = build(TINY_23)
    connectors.prepare_for_inference()
    states, mask = random_prompts([8, 3])
    with torch.inference_mode():
        compiled = torch.compile(connectors, backend="eager", fullgraph=True)(states, mask, 8)
        for out, expected in zip(compiled, connectors(states, mask, 8), strict=True):
            assert torch.equal(out, expected)


def build(options: dict) -> LTX2Connectors:
    connectors = LTX2Connectors(LTX2ConnectorsConfig.from_dict(options))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in connectors.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            noise = 1 + 0.3 * noise
        elif parameter.ndim == 2 and "registers" not in name:
            noise = noise / parameter.shape[1] ** 0.5
        parameter.copy_(noise)
    return connectors


def without_blocks(connectors: LTX2Connectors) -> LTX2Connectors:
    """Their residuals alone."""
    for name, parameter in connectors.named_parameters():
        if ".to_out." in name or ".ff.net.2." in name:
            parameter.zero_()
    return connectors


def random_prompts(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """States (B, 3, 8, 16), and which of the 8 are tokens: the last ones."""
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(len(lengths), 3, 8, 16, generator=generator)
    return states, torch.arange(8) >= 8 - torch.tensor(lengths)[:, None]
