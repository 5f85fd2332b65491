"""CLIP text encoders against transformers: names and shapes at full size, values at fp32."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig as ReferenceConfig
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from raydiff.models.clip import CLIPTextConfig, CLIPTextEncoder
from tests.relative_error import relative_error

VIT_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
VIT_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}

SMALL = {"vocab_size": 320, "bos_token_id": 318, "pad_token_id": 1}
LEGACY, MODERN = {"eos_token_id": 2}, {"eos_token_id": 200}
SMALL_L = {"hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 3}
SMALL_H = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2}
SMALL_G = {"hidden_size": 80, "intermediate_size": 320, "num_attention_heads": 5}

PARITY_CASES = {
    "vit_l_legacy": (CLIPTextModel, {**VIT_L, **SMALL_L, **LEGACY, "num_hidden_layers": 4}),
    "vit_l_modern": (CLIPTextModel, {**VIT_L, **SMALL_L, **MODERN, "num_hidden_layers": 4}),
    "vit_l_projection": (
        CLIPTextModelWithProjection,
        {**VIT_L, **SMALL_L, **MODERN, "num_hidden_layers": 2, "projection_dim": 40},
    ),
    "vit_h_legacy": (CLIPTextModel, {**VIT_H, **SMALL_H, **LEGACY, "num_hidden_layers": 7}),
    "vit_h_modern": (
        CLIPTextModel,
        {**VIT_H, **SMALL_H, **MODERN, "num_hidden_layers": 3, "layer_norm_eps": 1e-3},
    ),
    "big_g_legacy": (
        CLIPTextModelWithProjection,
        {**BIG_G, **SMALL_G, **LEGACY, "num_hidden_layers": 8, "projection_dim": 112},
    ),
    "big_g_modern": (
        CLIPTextModelWithProjection,
        {**BIG_G, **SMALL_G, **MODERN, "num_hidden_layers": 1, "projection_dim": 80},
    ),
}


@pytest.mark.parametrize(
    ("reference_class", "sizes", "num_tensors"),
    [
        (CLIPTextModel, VIT_H, 372),
        (CLIPTextModel, VIT_L, 196),
        (CLIPTextModelWithProjection, BIG_G, 517),
    ],
    ids=["sd21", "sdxl_1", "sdxl_2"],
)
def test_full_size_names_and_shapes(reference_class, sizes, num_tensors):
    with torch.device("meta"):
        reference = reference_class(ReferenceConfig(**sizes))
        ours = CLIPTextEncoder(read_config(reference))
    expected = {name: tuple(t.shape) for name, t in file_state_dict(reference).items()}
    shapes = {name: tuple(t.shape) for name, t in ours.state_dict().items()}
    assert len(shapes) == num_tensors
    assert shapes == expected
    assert list(ours.buffers()) == []
    assert CLIPTextConfig.from_shapes(expected) == ours.config


@pytest.mark.parametrize(
    ("reference_class", "sizes"), PARITY_CASES.values(), ids=PARITY_CASES.keys()
)
@pytest.mark.parametrize("pads_with_eos", [False, True], ids=["pad_0", "pad_eos"])
@torch.no_grad()
def test_values_equal_transformers(reference_class, sizes, pads_with_eos):
    reference = reference_class(ReferenceConfig(**SMALL, **sizes)).eval()
    randomize(reference, seed=sizes["num_hidden_layers"])
    ours = CLIPTextEncoder(read_config(reference))
    ours.load_state_dict(file_state_dict(reference))
    # By the legacy rule eos is the largest id; by the modern one larger ids may stand beside it.
    eos_id = 319 if sizes["eos_token_id"] == 2 else sizes["eos_token_id"]
    input_ids = random_prompts(eos_id, eos_id if pads_with_eos else 0, seed=sizes["hidden_size"])

    expected = reference(input_ids, output_hidden_states=True)
    pooled = expected["text_embeds" if ours.text_projection is not None else "pooler_output"]
    for _ in ("as loaded", "fused", "fused twice"):
        out = ours(input_ids)
        assert relative_error(out.last_hidden_state, expected.last_hidden_state) <= 1e-5
        assert relative_error(out.penultimate, expected.hidden_states[-2]) <= 1e-5
        assert relative_error(out.pooled, pooled) <= 1e-5
        ours.prepare_for_inference()
    assert not any("q_proj" in name for name in ours.state_dict())


@pytest.mark.parametrize("case", ["vit_h_modern", "big_g_legacy"])
def test_config_json_written_by_transformers(case, tmp_path: Path):
    reference_class, sizes = PARITY_CASES[case]
    reference = reference_class(ReferenceConfig(**SMALL, **sizes))
    reference.save_pretrained(tmp_path)
    config = CLIPTextConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))
    assert config == read_config(reference)
    assert config.eos_token_id == sizes["eos_token_id"]
    assert config.projection_dim == (112 if case == "big_g_legacy" else None)


def read_config(reference) -> CLIPTextConfig:
    architectures = [type(reference).__name__]
    return CLIPTextConfig.from_dict({**reference.config.to_dict(), "architectures": architectures})


def file_state_dict(reference) -> dict[str, torch.Tensor]:
    """The model's tensors under the names that checkpoint files have."""
    prefix = "text_model." if isinstance(reference, CLIPTextModel) else ""
    return {prefix + name: tensor for name, tensor in reference.state_dict().items()}


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Weights at which every part of the model matters: activations of order 1, no zero bias."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "layer_norm" in name and name.endswith("weight"):
            noise = 1 + 0.3 * noise
        elif "embedding" not in name and parameter.ndim == 2:
            noise = 1.5 * noise / parameter.shape[1] ** 0.5
        parameter.data.copy_(noise)


def random_prompts(eos_id: int, pad_id: int, seed: int) -> torch.Tensor:
    """(6, 77): bos, 0 to 75 random ids, eos, padding."""
    generator = torch.Generator().manual_seed(seed)
    bos, eos = torch.tensor([318]), torch.tensor([eos_id])
    rows = []
    for length in (0, 1, 7, 40, 74, 75):
        ids = torch.randint(3, 319, (length,), generator=generator)
        ids = torch.where(ids == eos_id, eos_id + 1, ids)
        rows.append(torch.cat([bos, ids, eos, torch.full((75 - length,), pad_id)]))
    return torch.stack(rows)
