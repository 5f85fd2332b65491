"""Gemma 3 as a text encoder: reading configs, and the promises of the forward."""

import pytest
import torch

from raydiff.errors import ModelError
from raydiff.models.gemma3 import Gemma3Config, Gemma3TextEncoder, Rope
from tests.relative_error import relative_error

GOOGLE = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "model_type": "gemma3_text",
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}

LAYER_TYPES = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(48)]

TRANSFORMERS_4 = {
    **GOOGLE["text_config"],
    "_sliding_window_pattern": 6,
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "layer_types": LAYER_TYPES,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_theta": 1000000.0,
    "use_bidirectional_attention": False,
    "vocab_size": 262208,
}

TRANSFORMERS_5 = {
    **{name: value for name, value in TRANSFORMERS_4.items() if "rope" not in name},
    "rope_parameters": {
        "full_attention": {"factor": 8.0, "rope_theta": 1000000.0, "rope_type": "linear"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
}

TINY = Gemma3Config.from_dict(
    {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 4,
        "sliding_window_pattern": 2,
    }
)


@pytest.mark.parametrize(
    "config",
    [GOOGLE, TRANSFORMERS_4, TRANSFORMERS_5, {"text_config": TRANSFORMERS_5}],
    ids=["google", "transformers_4", "transformers_5", "nested"],
)
def test_every_spelling_of_the_12b_config(config):
    assert Gemma3Config.from_dict(config) == Gemma3Config(
        vocab_size=262208,
        hidden_size=3840,
        intermediate_size=15360,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        rms_norm_eps=1e-6,
        query_pre_attn_scalar=256,
        sliding_window=1024,
        is_sliding=(True, True, True, True, True, False) * 8,
        rope=Rope(theta=1e6, factor=8.0),
        sliding_rope=Rope(theta=1e4),
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gemma4_text"}, "model_type is 'gemma4_text'; only 'gemma3_text' can"),
        ({"attention_bias": True}, "attention_bias is True; only False can be run"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; only None"),
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "rope_type is 'yarn'"),
        ({"layer_types": ["full_attention"]}, "layer_types is .* each of the 48 layers"),
        ({"layer_types": ["chunked"] * 48}, "layer_types is .* each of the 48 layers"),
        ({"num_key_value_heads": 5}, "num_attention_heads is 16; it must be a multiple .* 5"),
        ({"head_dim": 255}, "head_dim is 255; it must be even"),
        ({"hidden_size": 0}, "hidden_size is 0; expected a positive integer"),
        ({"sliding_window": None}, "sliding_window is None; expected a positive integer"),
    ],
)
def test_config_values_that_are_refused(change, words):
    with pytest.raises(ModelError, match=words):
        Gemma3Config.from_dict({**TRANSFORMERS_4, **change})


def test_config_of_something_else():
    with pytest.raises(ModelError, match="model_type is 't5'"):
        Gemma3Config.from_dict({"model_type": "t5", "d_model": 4096})


def test_full_width_forward_without_data():
    """On the meta device any look at a value (a host sync) would raise. The widths are real."""
    config = Gemma3Config.from_dict({**TRANSFORMERS_4, "num_hidden_layers": 6, "layer_types": None})
    with torch.device("meta"):
        encoder = Gemma3TextEncoder(config).to(torch.bfloat16)
        input_ids = torch.zeros(2, 1024, dtype=torch.int64)
        mask = torch.zeros(2, 1024, dtype=torch.bool)
    encoder.prepare_for_inference()
    states = encoder(input_ids, mask)
    assert states.shape == (2, 7, 1024, 3840)
    assert states.dtype == torch.bfloat16


def test_padding_is_masked():
    """Whatever ids stand there, tokens do not see them; and no state is NaN, even at padding."""
    encoder = random_encoder()
    input_ids, mask = random_prompts([10, 6, 1, 0])
    states = encoder(input_ids, mask)
    other = encoder(torch.where(mask, input_ids, 63 - input_ids), mask)
    assert torch.equal(tokens_of(states, mask), tokens_of(other, mask))
    assert states.isfinite().all()
    unmasked = encoder(input_ids, torch.ones_like(mask))
    assert relative_error(tokens_of(unmasked, mask), tokens_of(states, mask)) > 1e-2


def test_padding_sees_itself():
    """So that no row of the attention is empty, which some kernels answer with NaN."""
    encoder = random_encoder()
    input_ids = torch.tensor([[7]])
    is_token = torch.tensor([[True]])
    assert torch.equal(encoder(input_ids, ~is_token), encoder(input_ids, is_token))


def test_rows_do_not_depend_on_the_batch_or_on_padding_that_was_left_off():
    encoder = random_encoder()
    input_ids, mask = random_prompts([10, 6, 1])
    states = encoder(input_ids, mask)
    for row, length in enumerate((10, 6, 1)):
        alone = encoder(input_ids[row : row + 1, -length:], mask[row : row + 1, -length:])
        at = encoder(
            input_ids[row : row + 1, -length:],
            mask[row : row + 1, -length:],
            first_position=10 - length,
        )
        expected = states[row, :, -length:]
        assert torch.allclose(at[0], expected, atol=1e-5)
        # Rotary positions are relative: where a prompt begins is only a matter of rounding.
        assert torch.allclose(alone[0], expected, atol=1e-4)


def test_a_sliding_layer_sees_its_window_and_a_full_one_all():
    """The first layer slides over 4 tokens, the second does not."""
    encoder = random_encoder()
    input_ids, mask = random_prompts([10])
    states = encoder(input_ids, mask)
    changed = input_ids.clone()
    changed[0, 2] = 63 - changed[0, 2]
    moved = (encoder(changed, mask) - states)[0].abs().amax(dim=-1) > 1e-5  # (L + 1, S)
    assert moved[0].nonzero().flatten().tolist() == [2]
    assert moved[1].nonzero().flatten().tolist() == [2, 3, 4, 5]
    assert moved[2].nonzero().flatten().tolist() == [2, 3, 4, 5, 6, 7, 8, 9]


def test_norms_multiply_by_one_plus_the_weight():
    encoder = random_encoder()
    encoder.norm.weight.zero_()
    input_ids, mask = random_prompts([10])
    last = encoder(input_ids, mask)[0, -1]
    assert torch.allclose(last.pow(2).mean(dim=-1), torch.ones(10), atol=1e-4)


def test_module_built_on_meta_and_filled_equals_the_original():
    original = random_encoder()
    with torch.device("meta"):
        filled = Gemma3TextEncoder(TINY)
    filled.to_empty(device="cpu")
    for parameter in filled.parameters():
        parameter.fill_(torch.nan)
    filled.load_state_dict(original.state_dict())
    filled.prepare_for_inference()
    input_ids, mask = random_prompts([10, 3])
    assert torch.allclose(filled(input_ids, mask), original(input_ids, mask), atol=1e-5)


def test_fusing_keeps_dtype_and_asks_for_no_gradients():
    encoder = random_encoder().to(torch.bfloat16)
    size_bytes = sum(p.nbytes for p in encoder.parameters())
    encoder.prepare_for_inference()
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    assert sum(p.nbytes for p in encoder.parameters()) == size_bytes
    assert not any(p.requires_grad for p in encoder.parameters())


def test_compiles_to_one_graph():
    encoder = random_encoder()
    encoder.prepare_for_inference()
    input_ids, mask = random_prompts([10, 6])
    with torch.inference_mode():
        compiled = torch.compile(encoder, backend="eager", fullgraph=True)(input_ids, mask)
        assert torch.equal(compiled, encoder(input_ids, mask))


def random_encoder() -> Gemma3TextEncoder:
    encoder = Gemma3TextEncoder(TINY)
    generator = torch.Generator().manual_seed(3)
    for parameter in encoder.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * (0.3 if parameter.ndim == 1 else parameter.shape[1] ** -0.5))
    return encoder


def random_prompts(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 10) random ids, and which of them are tokens: the last ones."""
    generator = torch.Generator().manual_seed(4)
    input_ids = torch.randint(0, 64, (len(lengths), 10), generator=generator)
    return input_ids, torch.arange(10) >= 10 - torch.tensor(lengths)[:, None]


def tokens_of(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return states.transpose(1, 2)[mask]
