"""CLIP text encoders: OpenAI ViT-L (SDXL), OpenCLIP ViT-H (SD 2.x) and ViT-bigG (SDXL).

Parameter names are the checkpoint's. Inference only: no parameter asks for a gradient.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, Self, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydiff.errors import ModelError

HiddenAct = Literal["quick_gelu", "gelu"]

KNOWN_ENCODERS: dict[tuple[int, int], HiddenAct] = {
    (768, 12): "quick_gelu",  # OpenAI ViT-L/14: SDXL's first encoder
    (1024, 23): "gelu",  # OpenCLIP ViT-H/14 less its last layer: SD 2.x
    (1280, 32): "gelu",  # OpenCLIP ViT-bigG/14: SDXL's second encoder
}
"""Activation by (hidden size, layers): the one thing that weight shapes do not show."""

LEGACY_EOS_TOKEN_ID = 2
"""In configs older than transformers 4.31: not the id, but "at the largest id of the row"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CLIPTextConfig:
    """Sizes of a text encoder; the defaults are the ones that a config.json may leave out."""

    vocab_size: int = 49408
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 77
    hidden_act: HiddenAct = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    projection_dim: int | None = None
    """Width of the pooled output; None where the checkpoint has no `text_projection`."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a text encoder's config.json; keys that mean nothing here are left alone.

        Raises ModelError for a missing size, an unknown activation or sizes that do not fit.
        """
        own = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        # Every config has a projection_dim; only this class has the layer that it describes.
        if "CLIPTextModelWithProjection" not in (config.get("architectures") or ()):
            own["projection_dim"] = None
        required = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [name for name in required if name not in own]
        if missing:
            raise ModelError(
                f"CLIP text encoder config: {', '.join(missing)} missing; "
                "expected the config.json of a CLIPTextModel"
            )
        _check(own)
        return cls(**own)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """Detect the encoder from its tensors' names and shapes alone (original single files).

        Raises ModelError when the sizes are not those of an encoder in `KNOWN_ENCODERS`.
        """
        embeddings = "text_model.embeddings."
        layers = "text_model.encoder.layers."
        try:
            vocab_size, hidden_size = shapes[embeddings + "token_embedding.weight"]
            max_position_embeddings, _ = shapes[embeddings + "position_embedding.weight"]
            intermediate_size, _ = shapes[layers + "0.mlp.fc1.weight"]
        except KeyError as error:
            raise ModelError(f"CLIP text encoder: tensor {error} missing") from None
        names = (name.removeprefix(layers) for name in shapes if name.startswith(layers))
        num_layers = len({name.split(".")[0] for name in names})
        hidden_act = KNOWN_ENCODERS.get((hidden_size, num_layers))
        if hidden_act is None:
            known = ", ".join(f"{width} x {depth}" for width, depth in KNOWN_ENCODERS)
            raise ModelError(
                f"CLIP text encoder: {hidden_size} wide with {num_layers} layers; known without "
                f"a config are {known}. Use a folder that has the encoder's config.json"
            )
        projection = shapes.get("text_projection.weight")
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_layers,
            num_attention_heads=hidden_size // 64,
            max_position_embeddings=max_position_embeddings,
            hidden_act=hidden_act,
            projection_dim=projection[0] if projection else None,
        )


def _check(config: Mapping[str, Any]) -> None:
    act = config.get("hidden_act", "quick_gelu")
    if act not in get_args(HiddenAct):
        raise ModelError(
            f"CLIP text encoder config: hidden_act is {act!r}; "
            f"known are {' and '.join(get_args(HiddenAct))}"
        )
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if width % heads:
        raise ModelError(
            f"CLIP text encoder config: hidden_size {width} is not a multiple of "
            f"num_attention_heads {heads}"
        )
    if not isinstance(config.get("eos_token_id", 0), int):
        raise ModelError(
            f"CLIP text encoder config: eos_token_id is {config['eos_token_id']!r}; "
            "expected one integer"
        )


class CLIPTextOutput(NamedTuple):
    """What a prompt becomes; each family takes the member it was trained with."""

    last_hidden_state: Tensor
    """(B, S, C), after the final LayerNorm."""
    penultimate: Tensor
    """(B, S, C), what the last layer is given; no final LayerNorm."""
    pooled: Tensor
    """(B, P) the end-of-text row of `last_hidden_state`, projected if there is a projection."""


class CLIPTextEncoder(nn.Module):
    """Token ids to embeddings: a causal pre-LayerNorm transformer."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config)
        self.text_projection = (
            nn.Linear(config.hidden_size, config.projection_dim, bias=False)
            if config.projection_dim is not None
            else None
        )
        self.requires_grad_(False)

    def forward(self, input_ids: Tensor) -> CLIPTextOutput:
        """Encode `input_ids` (B, S) int64, bos and eos included. Padding is not masked: it comes
        after eos, where the causal mask already hides it, and the UNet was trained to see it."""
        last, penultimate = self.text_model(input_ids)  # (B, S, C) each
        rows = torch.arange(input_ids.shape[0], device=input_ids.device)
        pooled = last[rows, self._eos_positions(input_ids)]  # (B, C)
        if self.text_projection is not None:
            pooled = self.text_projection(pooled)  # (B, P)
        return CLIPTextOutput(last, penultimate, pooled)

    def prepare_for_inference(self) -> None:
        """Fuse each layer's q, k and v into one product. Call once the weights are loaded: the
        parameters have the checkpoint's names until then."""
        for layer in self.text_model.encoder.layers:
            cast(CLIPEncoderLayer, layer).self_attn.fuse()

    def _eos_positions(self, input_ids: Tensor) -> Tensor:
        """First position of the end-of-text token in each row: (B,)."""
        if self.config.eos_token_id == LEGACY_EOS_TOKEN_ID:
            return input_ids.argmax(dim=-1)
        return (input_ids == self.config.eos_token_id).int().argmax(dim=-1)


class CLIPTextTransformer(nn.Module):
    """Everything below the projection."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        last, penultimate = self.encoder(self.embeddings(input_ids))
        return self.final_layer_norm(last), penultimate


class CLIPTextEmbeddings(nn.Module):
    """Token plus learned position embeddings."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = self.position_embedding.weight[: input_ids.shape[1]]  # (S, C)
        return self.token_embedding(input_ids) + positions  # (B, S, C)


class CLIPEncoder(nn.Module):
    """The layers; gives the last one's output and input."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers)
        )

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        penultimate = hidden
        for layer in self.layers:
            penultimate, hidden = hidden, layer(hidden)
        return hidden, penultimate


class CLIPEncoderLayer(nn.Module):
    """Attention and MLP, each behind a LayerNorm and a residual."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.mlp(self.layer_norm2(hidden))


class CLIPAttention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.qkv_proj: nn.Linear | None = None
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.qkv_proj is not None:
            qkv = self.qkv_proj(hidden).chunk(3, dim=-1)
        else:
            qkv = (self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden))
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in qkv)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, S, C / heads)
        return self.out_proj(out.transpose(1, 2).flatten(2))  # (B, S, C)

    def fuse(self) -> None:
        """Replace q_proj, k_proj and v_proj by one qkv_proj that holds their weights."""
        if self.qkv_proj is not None:
            return
        parts = (self.q_proj, self.k_proj, self.v_proj)
        width = self.q_proj.in_features
        fused = nn.Linear(width, 3 * width, device="meta")
        weight, bias = torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])
        fused.weight = nn.Parameter(weight, requires_grad=False)  # (3C, C)
        fused.bias = nn.Parameter(bias, requires_grad=False)  # (3C,)
        self.qkv_proj = fused
        del self.q_proj, self.k_proj, self.v_proj


class CLIPMLP(nn.Module):
    """Two linears around the activation."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.hidden_act = config.hidden_act
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.fc1(hidden)
        if self.hidden_act == "gelu":
            return self.fc2(F.gelu(hidden))
        return self.fc2(hidden * torch.sigmoid(1.702 * hidden))  # quick_gelu, as OpenAI trained it
