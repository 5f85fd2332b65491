"""CLIP text encoders: reading configs, detection from shapes, and the promises of the forward."""

import pytest
import torch

from raydiff.errors import ModelError
from raydiff.models.clip import CLIPTextConfig, CLIPTextEncoder

SD21_CONFIG_JSON = {
    "_name_or_path": "hf-models/stable-diffusion-v2-768x768/text_encoder",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "pad_token_id": 1,
    "projection_dim": 512,
    "torch_dtype": "float32",
    "transformers_version": "4.25.0.dev0",
    "vocab_size": 49408,
}

SDXL_2_CONFIG_JSON = {
    "architectures": ["CLIPTextModelWithProjection"],
    "dtype": "float16",
    "eos_token_id": 49407,
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}

TINY = CLIPTextConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    eos_token_id=63,
    projection_dim=24,
)


def test_config_of_old_transformers():
    assert CLIPTextConfig.from_dict(SD21_CONFIG_JSON) == CLIPTextConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        hidden_act="gelu",
        eos_token_id=2,
    )


def test_config_that_leaves_defaults_out():
    assert CLIPTextConfig.from_dict(SDXL_2_CONFIG_JSON) == CLIPTextConfig(
        vocab_size=49408,
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        max_position_embeddings=77,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        eos_token_id=49407,
        projection_dim=1280,
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'; known are quick_gelu and gelu"),
        ({"num_attention_heads": 15}, "hidden_size 1024 is not a multiple .* 15"),
        ({"eos_token_id": [2, 5]}, r"eos_token_id is \[2, 5\]; expected one integer"),
    ],
)
def test_config_values_that_are_refused(change, words):
    with pytest.raises(ModelError, match=words):
        CLIPTextConfig.from_dict({**SD21_CONFIG_JSON, **change})


def test_config_of_something_else():
    with pytest.raises(ModelError, match="hidden_size, intermediate_size, num_hidden_layers"):
        CLIPTextConfig.from_dict({"model_type": "clip", "text_config": SD21_CONFIG_JSON})


@pytest.mark.parametrize("config_json", [SD21_CONFIG_JSON, SDXL_2_CONFIG_JSON])
def test_detection_from_shapes_equals_the_config(config_json):
    config = CLIPTextConfig.from_dict({**config_json, "eos_token_id": 49407})
    assert CLIPTextConfig.from_shapes(shapes_of(config)) == config


def test_detection_refuses_what_it_does_not_know():
    with pytest.raises(ModelError, match=r"32 wide with 2 layers; known .* 768 x 12, 1024 x 23"):
        CLIPTextConfig.from_shapes(shapes_of(TINY))
    with pytest.raises(ModelError, match=r"token_embedding\.weight' missing"):
        CLIPTextConfig.from_shapes({"conv_in.weight": (320, 4, 3, 3)})


@pytest.mark.parametrize("config_json", [SD21_CONFIG_JSON, SDXL_2_CONFIG_JSON])
def test_full_size_forward_without_data(config_json):
    """On the meta device any look at a value (a host sync) would raise."""
    config = CLIPTextConfig.from_dict(config_json)
    with torch.device("meta"):
        encoder = CLIPTextEncoder(config)
        input_ids = torch.zeros(3, 77, dtype=torch.int64)
    encoder.prepare_for_inference()
    out = encoder(input_ids)
    width = config.hidden_size
    assert out.last_hidden_state.shape == out.penultimate.shape == (3, 77, width)
    assert out.pooled.shape == (3, config.projection_dim or width)


def test_module_built_on_meta_and_filled_equals_the_original():
    torch.manual_seed(3)
    original = CLIPTextEncoder(TINY)
    with torch.device("meta"):
        filled = CLIPTextEncoder(TINY)
    filled.to_empty(device="cpu")
    for parameter in filled.parameters():
        parameter.fill_(torch.nan)
    filled.load_state_dict(original.state_dict())
    filled.prepare_for_inference()
    input_ids = torch.randint(0, 64, (4, 20))
    for ours, theirs in zip(filled(input_ids), original(input_ids), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_fusing_keeps_dtype_and_asks_for_no_gradients():
    encoder = CLIPTextEncoder(TINY).to(torch.bfloat16)
    size_bytes = sum(p.nbytes for p in encoder.parameters())
    encoder.prepare_for_inference()
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    assert sum(p.nbytes for p in encoder.parameters()) == size_bytes
    assert not any(p.requires_grad for p in encoder.parameters())
    assert encoder(torch.randint(0, 64, (2, 77))).pooled.dtype == torch.bfloat16


def test_prompt_is_not_changed_by_what_follows_eos():
    """The causal mask keeps padding out of the rows up to eos, and of the pooled row."""
    torch.manual_seed(5)
    encoder = CLIPTextEncoder(TINY)
    input_ids = torch.randint(0, 63, (1, 30))
    input_ids[0, 10:] = 63
    repadded = input_ids.clone()
    repadded[0, 11:] = 0
    a, b = encoder(input_ids), encoder(repadded)
    assert torch.allclose(a.pooled, b.pooled, atol=1e-6)
    assert torch.allclose(a.penultimate[:, :11], b.penultimate[:, :11], atol=1e-6)
    assert not torch.allclose(a.penultimate[:, 11:], b.penultimate[:, 11:], atol=1e-2)


@pytest.mark.parametrize("eos_token_id", [2, 63])
def test_compiles_to_one_graph(eos_token_id):
    torch.manual_seed(7)
    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
        eos_token_id=eos_token_id,
    )
    encoder = CLIPTextEncoder(config)
    encoder.prepare_for_inference()
    input_ids = torch.randint(0, 64, (2, 77))
    with torch.inference_mode():
        compiled = torch.compile(encoder, backend="eager", fullgraph=True)(input_ids)
        for ours, eager in zip(compiled, encoder(input_ids), strict=True):
            assert torch.equal(ours, eager)


def shapes_of(config: CLIPTextConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        encoder = CLIPTextEncoder(config)
    return {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
