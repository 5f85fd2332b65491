"""Gemma 3's language model against transformers: names and shapes at full size, values at fp32."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Gemma3Config as ReferenceConfig
from transformers import Gemma3ForConditionalGeneration, Gemma3TextConfig, Gemma3TextModel

from raydiff.models.gemma3 import Gemma3Config, Gemma3TextEncoder
from tests.relative_error import relative_error

GEMMA_12B = {
    "hidden_size": 3840,
    "intermediate_size": 15360,
    "model_type": "gemma3_text",
    "num_attention_heads": 16,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}
"""As Google's config.json has it, under `text_config`."""

SMALL = {
    "vocab_size": 100,
    "hidden_size": 60,
    "intermediate_size": 112,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "query_pre_attn_scalar": 40,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 6,
}

CASES = {
    "12b_like": SMALL,
    "without_scaling": {**SMALL, "rope_scaling": None, "num_key_value_heads": 4},
    "one_kv_head": {**SMALL, "num_key_value_heads": 1, "num_hidden_layers": 3},
    "all_within_the_window": {**SMALL, "sliding_window": 20},
    "other_pattern": {
        **SMALL,
        "num_hidden_layers": 3,
        "rms_norm_eps": 1e-3,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_local_base_freq": 100.0,
        "rope_theta": 5000.0,
    },
}

LENGTHS = (20, 13, 1)
MASK = torch.arange(20) >= 20 - torch.tensor(LENGTHS)[:, None]


def test_full_size_names_and_shapes():
    with torch.device("meta"):
        reference = Gemma3TextModel(Gemma3TextConfig(**GEMMA_12B))
        ours = Gemma3TextEncoder(Gemma3Config.from_dict({"text_config": GEMMA_12B}))
    shapes = {name: tuple(t.shape) for name, t in ours.state_dict().items()}
    assert shapes == {name: tuple(t.shape) for name, t in reference.state_dict().items()}
    assert len(shapes) == 626
    assert sum(t.numel() for t in ours.state_dict().values()) == 11_766_034_176
    assert list(ours.buffers()) == []
    assert ours.config == Gemma3Config.from_dict(reference.config.to_dict())


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES.keys())
@torch.no_grad()
def test_values_equal_transformers(sizes):
    reference, ours = pair(sizes)
    input_ids = torch.randint(0, 100, MASK.shape, generator=torch.Generator().manual_seed(8))
    expected = reference_states(reference, input_ids)
    for _ in ("as loaded", "fused", "fused twice"):
        states = ours(input_ids, MASK)
        assert states.shape == (3, ours.config.num_hidden_states, 20, 60)
        for layer in range(ours.config.num_hidden_states):
            at_tokens = states[:, layer][MASK]
            assert relative_error(at_tokens, expected[:, layer][MASK]) <= 1e-5, layer
        ours.prepare_for_inference()
    assert not any("q_proj" in name or "gate_proj" in name for name in ours.state_dict())


@torch.no_grad()
def test_columns_of_padding_may_be_left_off():
    reference, ours = pair(SMALL)
    input_ids = torch.randint(0, 100, MASK.shape, generator=torch.Generator().manual_seed(9))
    expected = reference_states(reference, input_ids)[1:, :, 7:]
    mask = MASK[1:, 7:]
    states = ours(input_ids[1:, 7:], mask, first_position=7)
    for layer in range(ours.config.num_hidden_states):
        assert relative_error(states[:, layer][mask], expected[:, layer][mask]) <= 1e-5


@torch.no_grad()
def test_positions_count_the_padding():
    """A plain arange over the padded length, whatever columns of padding are left off."""
    reference, ours = pair(SMALL)
    hidden = torch.zeros(1, 1000, 1)
    positions = torch.arange(24, 1024)[None]
    tables = ours.rope_tables(hidden, first_position=24)
    for kind, table in (("sliding_attention", tables.sliding), ("full_attention", tables.full)):
        for ours_half, theirs in zip(
            table, reference.rotary_emb(hidden, positions, kind), strict=True
        ):
            assert torch.equal(ours_half.repeat(1, 2), theirs[0])


@torch.no_grad()
def test_bfloat16_is_as_near_as_its_rounding():
    """Embeddings are multiplied by sqrt(3840) as bfloat16 has it, 62; norms are in float32."""
    reference, ours = pair({**SMALL, "hidden_size": 3840, "num_hidden_layers": 2})
    reference, ours = reference.to(torch.bfloat16), ours.to(torch.bfloat16)
    input_ids = torch.randint(0, 100, MASK.shape, generator=torch.Generator().manual_seed(10))
    expected = reference_states(reference, input_ids)
    states = ours(input_ids, MASK)
    assert states.dtype == torch.bfloat16
    assert torch.equal(states[:, 0], expected[:, 0])
    assert torch.equal(states[:, 0], ours.embed_tokens(input_ids) * 62.0)
    for layer in (1, 2):
        out, ref = states[:, layer][MASK].float(), expected[:, layer][MASK].float()
        assert relative_error(out, ref) <= 1e-2


@torch.no_grad()
def test_49_hidden_states_begin_with_the_embedding_and_end_normalised():
    reference, ours = pair(SMALL)
    input_ids = torch.randint(0, 100, MASK.shape, generator=torch.Generator().manual_seed(11))
    states = ours(input_ids, MASK)
    embedding = ours.embed_tokens(input_ids) * 60**0.5
    assert torch.allclose(states[:, 0], embedding)
    last = reference(input_ids=input_ids, attention_mask=MASK.long()).last_hidden_state
    assert relative_error(states[:, -1][MASK], last[MASK]) <= 1e-5
    assert ours.norm(states[:, -2][MASK]).sub(states[:, -1][MASK]).norm() > 1
    assert Gemma3Config.from_dict(GEMMA_12B).num_hidden_states == 49


def test_config_json_written_by_transformers(tmp_path: Path):
    """Of the whole model, as LTX2Pipeline saves it; and its tensors' names below the prefix."""
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 28,
        "patch_size": 14,
    }
    config = ReferenceConfig(text_config=Gemma3TextConfig(**SMALL), vision_config=vision)
    reference = Gemma3ForConditionalGeneration(config)
    config.save_pretrained(tmp_path)
    ours = Gemma3Config.from_dict(json.loads((tmp_path / "config.json").read_text()))
    assert ours == Gemma3Config.from_dict(SMALL)
    prefix = "model.language_model."
    names = {n.removeprefix(prefix) for n in reference.state_dict() if n.startswith(prefix)}
    with torch.device("meta"):
        assert names == set(Gemma3TextEncoder(ours).state_dict())


def pair(sizes) -> tuple[Gemma3TextModel, Gemma3TextEncoder]:
    reference = Gemma3TextModel(Gemma3TextConfig(**sizes)).eval()
    generator = torch.Generator().manual_seed(sizes["num_hidden_layers"])
    for name, parameter in reference.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            noise = 0.3 * noise
        elif "embed" not in name:
            noise = 1.5 * noise / parameter.shape[1] ** 0.5
        parameter.data.copy_(noise)
    ours = Gemma3TextEncoder(Gemma3Config.from_dict(sizes))
    ours.load_state_dict(reference.state_dict())
    return reference, ours


def reference_states(reference: Gemma3TextModel, input_ids: torch.Tensor) -> torch.Tensor:
    out = reference(input_ids=input_ids, attention_mask=MASK.long(), output_hidden_states=True)
    return torch.stack(out.hidden_states, dim=1)
