"""LTX-2's text connectors against diffusers: names and shapes at full size, values at fp32."""

import json
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors, per_layer_masked_mean_norm

from raydiff.models.ltx2.connectors import LTX2Connectors, LTX2ConnectorsConfig
from tests.relative_error import relative_error

FULL_20 = {"rope_type": "split"}
FULL_23 = {
    "rope_type": "split",
    "per_modality_projections": True,
    "proj_bias": True,
    "video_gated_attn": True,
    "audio_gated_attn": True,
    "video_connector_num_attention_heads": 32,
    "audio_connector_num_attention_heads": 32,
    "audio_connector_attention_head_dim": 64,
    "video_connector_num_layers": 8,
    "audio_connector_num_layers": 8,
}

V20 = {
    "rope_type": "split",
    "caption_channels": 24,
    "text_proj_in_factor": 5,
    "video_connector_num_attention_heads": 3,
    "video_connector_attention_head_dim": 8,
    "video_connector_num_learnable_registers": 4,
    "audio_connector_num_attention_heads": 2,
    "audio_connector_attention_head_dim": 12,
    "audio_connector_num_learnable_registers": 8,
}
V23 = {
    "rope_type": "split",
    "caption_channels": 24,
    "text_proj_in_factor": 5,
    "per_modality_projections": True,
    "proj_bias": True,
    "video_hidden_dim": 32,
    "video_gated_attn": True,
    "video_connector_num_attention_heads": 4,
    "video_connector_attention_head_dim": 8,
    "video_connector_num_layers": 3,
    "video_connector_num_learnable_registers": 8,
    "audio_hidden_dim": 12,
    "audio_gated_attn": True,
    "audio_connector_num_attention_heads": 2,
    "audio_connector_attention_head_dim": 6,
    "audio_connector_num_layers": 3,
    "audio_connector_num_learnable_registers": 4,
}
CASES = {
    "v20": V20,
    "v23": V23,
    "v20_interleaved": {**V20, "rope_type": "interleaved", "rope_theta": 500.0},
    "v23_single_precision": {**V23, "rope_double_precision": False, "proj_bias": False},
    "v23_gates_for_video_alone": {**V23, "audio_gated_attn": False},
    "v20_short_base": {**V20, "connector_rope_base_seq_len": 32, "proj_bias": True},
}

LENGTHS = (24, 9, 1)
MASK = torch.arange(24) >= 24 - torch.tensor(LENGTHS)[:, None]


@pytest.mark.parametrize(
    ("options", "num_tensors", "num_parameters"),
    [(FULL_20, 59, 1_431_475_200), (FULL_23, 262, 3_172_227_584)],
    ids=["v20", "v23"],
)
def test_full_size_names_and_shapes(options, num_tensors, num_parameters):
    with torch.device("meta"):
        reference = LTX2TextConnectors(**options)
        ours = LTX2Connectors(LTX2ConnectorsConfig.from_dict(options))
    shapes = {name: tuple(t.shape) for name, t in ours.state_dict().items()}
    assert shapes == {name: tuple(t.shape) for name, t in reference.state_dict().items()}
    assert len(shapes) == num_tensors
    assert sum(t.numel() for t in ours.state_dict().values()) == num_parameters
    assert list(ours.buffers()) == []


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
@torch.no_grad()
def test_values_equal_diffusers(options):
    reference, ours = pair(options)
    states = random_states(seed=1)
    video, audio, mask = reference(as_diffusers_packs(states), MASK.long())
    assert mask.all()
    for _ in ("as loaded", "fused", "fused twice"):
        embeds = ours(states, MASK, 24)
        assert relative_error(embeds.video, video) <= 1e-5
        assert relative_error(embeds.audio, audio) <= 1e-5
        # Columns of padding that were left off come back as registers.
        short = ours(states[1:, :, -9:], MASK[1:, -9:], 24)
        assert relative_error(short.video, video[1:]) <= 1e-5
        assert relative_error(short.audio, audio[1:]) <= 1e-5
        ours.prepare_for_inference()
    assert not any(".to_q." in name for name in ours.state_dict())


@torch.no_grad()
def test_packing_varies_layers_fastest_and_normalises_each_over_its_prompt():
    """Index d * 49 + layer, 8 * (x - mean) / (max - min + 1e-6), zeros at padding."""
    _, ours = pair(V20)
    states = random_states(seed=2)
    packed = ours.pack(states, MASK)
    expected = per_layer_masked_mean_norm(
        states.permute(0, 2, 3, 1), MASK.sum(dim=1), device="cpu", padding_side="left"
    )
    assert relative_error(packed, expected) <= 1e-6
    row, layer, length = 1, 3, LENGTHS[1]
    own = states[row, layer, -length:]
    by_hand = 8 * (own - own.mean()) / (own.max() - own.min() + 1e-6)
    assert torch.allclose(packed[row, -length:, layer::5], by_hand, atol=1e-5)
    assert (packed[row, :-length] == 0).all()


def test_config_json_written_by_diffusers(tmp_path: Path):
    for options in (V20, V23):
        LTX2TextConnectors(**options).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert LTX2ConnectorsConfig.from_dict(config) == LTX2ConnectorsConfig.from_dict(options)


def pair(options) -> tuple[LTX2TextConnectors, LTX2Connectors]:
    reference = LTX2TextConnectors(**options).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in reference.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            noise = 1 + 0.3 * noise
        elif parameter.ndim == 2 and "registers" not in name:
            noise = 1.5 * noise / parameter.shape[1] ** 0.5
        parameter.data.copy_(noise)
    ours = LTX2Connectors(LTX2ConnectorsConfig.from_dict(options))
    ours.load_state_dict(reference.state_dict())
    return reference, ours


def random_states(seed: int) -> torch.Tensor:
    """(3, 5, 24, 24) whose layers differ in size and mean, as a language model's do."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([1.0, 3.0, 0.5, 40.0, 2.0])[None, :, None, None]
    return sizes * (torch.randn(3, 5, 24, 24, generator=generator) + sizes / 10)


def as_diffusers_packs(states: torch.Tensor) -> torch.Tensor:
    return torch.stack(states.unbind(1), dim=-1).flatten(2, 3)
