"""Gemma 3's language model as a text encoder: token ids to the hidden states of every layer.

Parameter names are the checkpoint's below `language_model.model.`; the vision tower and the output
head are not built. Inference only. Source: Gemma 3 Technical Report (arXiv 2503.19786).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydiff.errors import ModelError
from raydiff.models.options import check_options, positive

COMPONENT = "text_encoder"
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """One rotary embedding: wavelengths up to `theta`, positions divided by `factor`."""

    theta: float
    factor: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Gemma3Config:
    """Sizes of the language model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    query_pre_attn_scalar: float
    sliding_window: int
    """Tokens that a sliding layer sees, its own included."""
    is_sliding: tuple[bool, ...]
    """By layer; the others see all tokens before."""
    rope: Rope
    """Of the full layers."""
    sliding_rope: Rope

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read the config.json of a Gemma 3 model, with its vision part or of the text alone.

        Raises ModelError for another model, and for an option that we do not run.
        """
        text = {**_DEFAULTS, **config.get("text_config", config)}
        check_options(COMPONENT, text, accepted=_ACCEPTED)
        rope, sliding_rope = _ropes(text)
        result = cls(
            **{name: positive(COMPONENT, text, name) for name in _SIZES},
            rms_norm_eps=text["rms_norm_eps"],
            query_pre_attn_scalar=text["query_pre_attn_scalar"],
            is_sliding=_sliding_layers(text),
            rope=rope,
            sliding_rope=sliding_rope,
        )
        _check_sizes(result)
        return result

    @property
    def num_hidden_states(self) -> int:
        """What the encoder returns for each token: the embedding, and each layer's output."""
        return 1 + self.num_hidden_layers


class Gemma3TextEncoder(nn.Module):
    """A causal transformer of which all hidden states are wanted, not the next token."""

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.requires_grad_(False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, *, first_position: int = 0
    ) -> Tensor:
        """input_ids (B, S) int64, attention_mask (B, S), true at tokens -> (B, L + 1, S, C).

        Of the L + 1 hidden states the first is the scaled embedding and the last is normalised.
        Positions count the padding on the left. Columns that are padding in every row may be left
        off: `first_position` is how many were. States at padding are finite and mean nothing.
        """
        hidden = self.embed_tokens(input_ids)  # (B, S, C)
        # Rounded to the weights' dtype first, as in training: 62 instead of 61.97 in bfloat16.
        hidden = hidden * hidden.new_full((), self.config.hidden_size**0.5)
        tokens = self._attended(attention_mask)
        tables = self.rope_tables(hidden, first_position)
        states = hidden.new_empty(
            hidden.shape[0], self.config.num_hidden_states, *hidden.shape[1:]
        )  # (B, L + 1, S, C)
        states[:, 0] = hidden
        kinds = zip(self.layers, self.config.is_sliding, strict=True)
        for index, (layer, is_sliding) in enumerate(kinds, start=1):
            hidden = layer(hidden, tokens.of(is_sliding), tables.of(is_sliding))
            is_last = index == self.config.num_hidden_layers
            states[:, index] = self.norm(hidden) if is_last else hidden
        return states

    def prepare_for_inference(self) -> None:
        """Fuse each layer's projections of one input into one product. Call once the weights are
        loaded: the parameters have the checkpoint's names until then."""
        for layer in self.layers:
            cast(DecoderLayer, layer).self_attn.fuse()
            cast(DecoderLayer, layer).mlp.fuse()

    def _attended(self, attention_mask: Tensor) -> "ByKind":
        """Which tokens (columns) each token (row) sees, by kind of layer: (B, 1, S, S) bool."""
        length = attention_mask.shape[1]
        index = torch.arange(length, device=attention_mask.device)
        distance = index[:, None] - index  # (S, S)
        # Padding sees itself: a row without any column is NaN in some attention kernels.
        seen = attention_mask.bool()[:, None, :] | (distance == 0)
        full = (seen & (distance >= 0))[:, None]
        if length <= self.config.sliding_window:
            return ByKind(full, full)
        return ByKind(full & (distance < self.config.sliding_window), full)

    def rope_tables(self, hidden: Tensor, first_position: int) -> "ByKind":
        """Cosines and sines by kind of layer: (2, S, D / 2), in the dtype of `hidden`."""
        positions = torch.arange(
            first_position,
            first_position + hidden.shape[1],
            dtype=torch.float32,
            device=hidden.device,
        )
        ropes = (self.config.sliding_rope, self.config.rope)
        return ByKind(
            *(rope_table(positions, rope, self.config.head_dim).to(hidden.dtype) for rope in ropes)
        )


class ByKind(NamedTuple):
    """What sliding layers take and what full ones take."""

    sliding: Tensor
    full: Tensor

    def of(self, is_sliding: bool) -> Tensor:
        """Return a layer's own."""
        return self.sliding if is_sliding else self.full


class DecoderLayer(nn.Module):
    """Attention and MLP, each between two norms and beside a residual."""

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(width, eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.pre_feedforward_layernorm = RMSNorm(width, eps)
        self.mlp = GatedMLP(width, config.intermediate_size)
        self.post_feedforward_layernorm = RMSNorm(width, eps)

    def forward(self, hidden: Tensor, attended: Tensor, table: Tensor) -> Tensor:
        out = self.self_attn(self.input_layernorm(hidden), attended, table)
        hidden = hidden + self.post_attention_layernorm(out)
        out = self.mlp(self.pre_feedforward_layernorm(hidden))
        return hidden + self.post_feedforward_layernorm(out)


class Attention(nn.Module):
    """Grouped-query attention: several query heads share a head of keys and values."""

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__()
        width, self.head_dim = config.hidden_size, config.head_dim
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.scale = config.query_pre_attn_scalar**-0.5
        self.q_proj = nn.Linear(width, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=False)
        self.qkv_proj: nn.Linear | None = None
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, width, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, hidden: Tensor, attended: Tensor, table: Tensor) -> Tensor:
        q, k, v = self._project(hidden)  # (B, S, heads, D) each
        q, k = rotate(self.q_norm(q), table), rotate(self.k_norm(k), table)
        # Copied rather than left to SDPA's enable_gqa, which no fused kernel takes with a mask.
        group = self.num_heads // self.num_kv_heads
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, S, D)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attended, scale=self.scale)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, S, C)

    def fuse(self) -> None:
        """Replace q_proj, k_proj and v_proj by one qkv_proj that holds their weights."""
        if self.qkv_proj is None:
            self.qkv_proj = stacked((self.q_proj, self.k_proj, self.v_proj))
            del self.q_proj, self.k_proj, self.v_proj

    def _project(self, hidden: Tensor) -> Sequence[Tensor]:
        if self.qkv_proj is None:
            projections = (self.q_proj, self.k_proj, self.v_proj)
            return [layer(hidden).unflatten(-1, (-1, self.head_dim)) for layer in projections]
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        return self.qkv_proj(hidden).unflatten(-1, (-1, self.head_dim)).split(heads, dim=2)


class GatedMLP(nn.Module):
    """Two projections multiplied, one of them through GELU (its tanh form)."""

    def __init__(self, width: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, intermediate_size, bias=False)
        self.up_proj = nn.Linear(width, intermediate_size, bias=False)
        self.gate_up_proj: nn.Linear | None = None
        self.down_proj = nn.Linear(intermediate_size, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.gate_up_proj is None:
            gate, up = self.gate_proj(hidden), self.up_proj(hidden)
        else:
            gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(F.gelu(gate, approximate="tanh") * up)

    def fuse(self) -> None:
        """Replace gate_proj and up_proj by one gate_up_proj that holds their weights."""
        if self.gate_up_proj is None:
            self.gate_up_proj = stacked((self.gate_proj, self.up_proj))
            del self.gate_proj, self.up_proj


class RMSNorm(nn.Module):
    """RMS norm in float32, times one plus the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        scale = 1.0 + self.weight.float()
        return F.rms_norm(x.float(), scale.shape, scale, self.eps).to(x.dtype)


def rope_table(positions: Tensor, rope: Rope, head_dim: int) -> Tensor:
    """Cosines and sines of float32 positions (S,): (2, S, head_dim / 2)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / rope.theta ** (exponents / head_dim) / rope.factor
    angles = positions[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the halves of each head of x (B, S, heads, D) against each other."""
    cos, sin = table[:, :, None].unbind(0)  # (S, 1, D / 2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def stacked(layers: Sequence[nn.Linear]) -> nn.Linear:
    """One linear layer without bias that gives the outputs of `layers` side by side."""
    weight = torch.cat([layer.weight for layer in layers])
    fused = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    fused.weight = nn.Parameter(weight, requires_grad=False)
    return fused


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
)

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
"""What a config that leaves an option out means by it: Google's own files name few."""

_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gemma3_text",),
    "attention_bias": (False,),
    "attn_logit_softcapping": (None,),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "use_bidirectional_attention": (False, None),
}
"""Options of which we run only these values."""


def _sliding_layers(text: Mapping[str, Any]) -> tuple[bool, ...]:
    """From `layer_types`, or by the older rule that every 6th layer is a full one."""
    num_layers = text["num_hidden_layers"]
    types = text.get("layer_types")
    if types is None:
        pattern = text.get("sliding_window_pattern", text.get("_sliding_window_pattern", 6))
        return tuple((index + 1) % pattern != 0 for index in range(num_layers))
    if len(types) != num_layers or not {*types} <= {SLIDING, FULL}:
        raise ModelError(
            f"{COMPONENT} config: layer_types is {types!r}; expected {SLIDING} or {FULL} for each "
            f"of the {num_layers} layers"
        )
    return tuple(name == SLIDING for name in types)


def _ropes(text: Mapping[str, Any]) -> tuple[Rope, Rope]:
    """The full and the sliding layers' embedding, as transformers 5 or an older one writes them."""
    parameters = text.get("rope_parameters") or {}
    full = {
        "rope_theta": text["rope_theta"],
        **(text.get("rope_scaling") or {}),
        **(parameters.get(FULL) or {}),
    }
    sliding = {"rope_theta": text["rope_local_base_freq"], **(parameters.get(SLIDING) or {})}
    return _rope(full), _rope(sliding)


def _rope(parameters: Mapping[str, Any]) -> Rope:
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in ("default", "linear"):
        raise ModelError(
            f"{COMPONENT} config: rope_type is {rope_type!r}; only 'default' or 'linear' can be run"
        )
    factor = parameters.get("factor", 1.0) if rope_type == "linear" else 1.0
    return Rope(theta=parameters["rope_theta"], factor=factor)


def _check_sizes(config: Gemma3Config) -> None:
    if config.num_attention_heads % config.num_key_value_heads:
        raise ModelError(
            f"{COMPONENT} config: num_attention_heads is {config.num_attention_heads}; it must be "
            f"a multiple of num_key_value_heads, {config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise ModelError(f"{COMPONENT} config: head_dim is {config.head_dim}; it must be even")
