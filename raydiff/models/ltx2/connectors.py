"""LTX-2's text connectors: the text encoder's hidden states to both streams' prompt embeddings.

Each stream's connector is a transformer over the prompt's tokens and learned registers, which take
the place of padding. Parameter names are those of the diffusers checkpoints (`connectors/`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydiff.errors import ModelError
from raydiff.models.ltx2.attention import SelfAttention
from raydiff.models.ltx2.rope import Rotation
from raydiff.models.ltx2.transformer_block import FeedForward
from raydiff.models.options import check_options, positive

COMPONENT = "connectors"
NORM_EPS = 1e-6
RANGE_GAIN = 8.0
"""LTX-2.0 spreads each layer's states over a range of this width."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectorConfig:
    """Shape of one stream's connector."""

    num_heads: int
    head_dim: int
    num_layers: int
    num_registers: int
    has_gates: bool

    @property
    def dim(self) -> int:
        """Width of the embeddings that it takes and returns."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class LTX2ConnectorsConfig:
    """Both connectors, and the projection of the text encoder's states into them."""

    hidden_size: int
    """Width of the text encoder."""
    num_hidden_states: int
    """Of the text encoder for each token."""
    video: ConnectorConfig
    audio: ConnectorConfig
    has_projection_for_each: bool
    """LTX-2.3: a projection for each stream, of states that are normalised token by token. Without,
    both share one, of states that are normalised over the whole prompt."""
    has_projection_bias: bool
    rope_type: Literal["split", "interleaved"]
    rope_theta: float
    rope_base_length: int
    has_double_precision_rope: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a diffusers `connectors/config.json`; an option we do not run is a ModelError."""
        check_options(COMPONENT, config, known=(*_DEFAULTS, *_WITHOUT_EFFECT), accepted=_ACCEPTED)
        options = {**_DEFAULTS, **config}
        for name, default in _DEFAULTS.items():
            if type(default) is int:
                positive(COMPONENT, options, name)
        result = cls(
            hidden_size=options["caption_channels"],
            num_hidden_states=options["text_proj_in_factor"],
            video=_connector_config(options, "video"),
            audio=_connector_config(options, "audio"),
            has_projection_for_each=options["per_modality_projections"],
            has_projection_bias=options["proj_bias"],
            rope_type=options["rope_type"],
            rope_theta=options["rope_theta"],
            rope_base_length=options["connector_rope_base_seq_len"],
            has_double_precision_rope=options["rope_double_precision"],
        )
        _check_widths(options, result)
        return result

    @property
    def num_features(self) -> int:
        """Features of a text's token: both streams' where each has a projection of its own."""
        if self.has_projection_for_each:
            return self.video.dim + self.audio.dim
        return self.hidden_size


class TextEmbeds(NamedTuple):
    """A batch of prompts as each stream takes them: (B, N, C) and (B, N, C')."""

    video: Tensor
    audio: Tensor


class LTX2Connectors(nn.Module):
    """The way of a prompt from the text encoder to the transformer, in two steps.

    `project` gives a few kilobytes for each token of the prompt; `connect` makes of them the 1,024
    embeddings that the transformer attends to. `forward` does both.
    """

    def __init__(self, config: LTX2ConnectorsConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size * config.num_hidden_states
        has_bias = config.has_projection_bias
        if config.has_projection_for_each:
            video_dim, audio_dim = config.video.dim, config.audio.dim
            # The projections were trained on states whose norm is that of their own width.
            gains = [math.sqrt(dim / config.hidden_size) for dim in (video_dim, audio_dim)]
            self.video_text_proj_in = ScaledLinear(width, video_dim, has_bias, gain=gains[0])
            self.audio_text_proj_in = ScaledLinear(width, audio_dim, has_bias, gain=gains[1])
        else:
            self.text_proj_in = nn.Linear(width, config.hidden_size, bias=has_bias)
        self.video_connector = Connector(config, config.video)
        self.audio_connector = Connector(config, config.audio)
        self.requires_grad_(False)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, num_embeds: int) -> TextEmbeds:
        """What `connect` returns of what `project` returns."""
        features = self.project(hidden_states, attention_mask)
        return self.connect(features, attention_mask, num_embeds)

    def project(self, hidden_states: Tensor, attention_mask: Tensor) -> TextEmbeds:
        """All states of the text encoder (B, L, S, C), attention_mask (B, S) -> (B, S, C') each.

        Features at padding mean nothing. In LTX-2.0 both streams share one tensor.
        """
        packed = self.pack(hidden_states, attention_mask)
        if self.config.has_projection_for_each:
            return TextEmbeds(self.video_text_proj_in(packed), self.audio_text_proj_in(packed))
        features = self.text_proj_in(packed)
        return TextEmbeds(features, features)

    def connect(self, features: TextEmbeds, attention_mask: Tensor, num_embeds: int) -> TextEmbeds:
        """features (B, S, C) each, attention_mask (B, S) -> (B, num_embeds, C) each.

        num_embeds is the length that the tokenizer pads to: a multiple of the registers, at least
        S. All of the embeddings count: the transformer needs no mask.
        """
        mask = attention_mask.bool()
        return TextEmbeds(
            self.video_connector(features.video, mask, num_embeds),
            self.audio_connector(features.audio, mask, num_embeds),
        )

    def pack(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L, S, C) -> (B, S, C * L): normalised, zero at padding, layers varying fastest."""
        mask = attention_mask.bool()[:, :, None]  # (B, S, 1)
        normalise = _by_token if self.config.has_projection_for_each else _by_prompt
        packed = hidden_states.new_empty(
            *mask.shape[:2],
            self.config.hidden_size,
            self.config.num_hidden_states,
            dtype=self.video_connector.learnable_registers.dtype,
        )
        # One layer at a time: all of a long prompt would be 0.8 GB in float32.
        for layer, states in enumerate(hidden_states.unbind(1)):
            packed[..., layer] = normalise(states.float(), mask)
        return packed.flatten(2)

    def prepare_for_inference(self) -> None:
        """Fuse each attention's query, key and value projections. Call once the weights are
        loaded: the parameters have the checkpoint's names until then."""
        for module in self.modules():
            if isinstance(module, SelfAttention):
                module.fuse_projections()


def _by_prompt(states: Tensor, mask: Tensor) -> Tensor:
    """LTX-2.0: centre one layer's states (B, S, C) and divide by their range over the prompt."""
    num_values = mask.sum(dim=(1, 2), keepdim=True) * states.shape[2]
    mean = torch.where(mask, states, 0.0).sum(dim=(1, 2), keepdim=True) / (num_values + NORM_EPS)
    low = torch.where(mask, states, math.inf).amin(dim=(1, 2), keepdim=True)
    high = torch.where(mask, states, -math.inf).amax(dim=(1, 2), keepdim=True)
    return torch.where(mask, (states - mean) / (high - low + NORM_EPS) * RANGE_GAIN, 0.0)


def _by_token(states: Tensor, mask: Tensor) -> Tensor:
    """LTX-2.3: divide each token's states (B, S, C) by their root mean square."""
    return torch.where(mask, F.rms_norm(states, states.shape[2:], eps=NORM_EPS), 0.0)


class ScaledLinear(nn.Module):
    """A linear layer of `gain` times its input, which is not copied for that."""

    def __init__(self, in_features: int, out_features: int, has_bias: bool, *, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return F.linear(x, self.weight) * self.gain
        rows = torch.addmm(self.bias, x.flatten(0, -2), self.weight.t(), alpha=self.gain)
        return rows.unflatten(0, x.shape[:-1])


class Connector(nn.Module):
    """A transformer over a prompt's features and, in the places after them, registers."""

    def __init__(self, config: LTX2ConnectorsConfig, own: ConnectorConfig) -> None:
        super().__init__()
        self.config = config
        self.own = own
        self.learnable_registers = nn.Parameter(torch.zeros(own.num_registers, own.dim))
        self.transformer_blocks = nn.ModuleList(
            ConnectorBlock(own, config.rope_type) for _ in range(own.num_layers)
        )

    def forward(self, features: Tensor, mask: Tensor, num_embeds: int) -> Tensor:
        """features (B, S, C), mask (B, S) bool -> (B, num_embeds, C)."""
        hidden = self._with_registers(features, mask, num_embeds)
        rotation = self._rotation(num_embeds, features.device)
        for block in self.transformer_blocks:
            hidden = block(hidden, rotation)
        return rms_norm(hidden)

    def _with_registers(self, features: Tensor, mask: Tensor, num_embeds: int) -> Tensor:
        """Each row's tokens, moved to the front in their order, then registers: (B, N, C).

        A place's register is the one of its position, however many tokens come before it.
        """
        length, num_registers = features.shape[1], self.own.num_registers
        if num_embeds % num_registers or num_embeds < length:
            raise ModelError(
                f"LTX-2 connectors: {num_embeds} embeddings of {length} tokens; expected at least "
                f"as many, and a multiple of the {num_registers} registers"
            )
        registers = self.learnable_registers.repeat(num_embeds // num_registers, 1)  # (N, C)
        order = torch.argsort(~mask, dim=1, stable=True)  # (B, S)
        tokens = features.gather(1, order[:, :, None].expand_as(features))
        tokens = F.pad(tokens, (0, 0, 0, num_embeds - length))
        positions = torch.arange(num_embeds, device=mask.device)
        is_token = positions < mask.sum(dim=1, keepdim=True)  # (B, N)
        return torch.where(is_token[:, :, None], tokens, registers)

    def _rotation(self, num_embeds: int, device: torch.device) -> Rotation:
        """Of positions as fractions of the base length, -1 to 1: (1, N, heads, head_dim / 2)."""
        config = self.config
        dtype = torch.float64 if config.has_double_precision_rope else torch.float32
        exponents = torch.linspace(0.0, 1.0, self.own.dim // 2, dtype=dtype, device=device)
        frequencies = (torch.pow(config.rope_theta, exponents) * math.pi / 2.0).float()
        positions = torch.arange(num_embeds, dtype=torch.float32, device=device)
        positions = positions / config.rope_base_length * 2 - 1
        angles = (positions[:, None] * frequencies).unflatten(-1, (self.own.num_heads, -1))[None]
        return Rotation(angles.cos(), angles.sin())


class ConnectorBlock(nn.Module):
    """Self attention and feed-forward, each behind an RMS norm and beside a residual."""

    def __init__(self, own: ConnectorConfig, rope_type: Literal["split", "interleaved"]) -> None:
        super().__init__()
        self.attn1 = SelfAttention(
            own.dim,
            own.dim,
            num_heads=own.num_heads,
            head_dim=own.head_dim,
            norm_eps=NORM_EPS,
            has_gates=own.has_gates,
            rope_type=rope_type,
        )
        self.ff = FeedForward(own.dim, has_bias=True)

    def forward(self, hidden: Tensor, rotation: Rotation) -> Tensor:
        hidden = hidden + self.attn1(rms_norm(hidden), rotation)
        return hidden + self.ff(rms_norm(hidden))


def rms_norm(x: Tensor) -> Tensor:
    """x over the root mean square of its channels; the blocks' norms have no weight."""
    return F.rms_norm(x, x.shape[-1:], eps=NORM_EPS)


_DEFAULTS: dict[str, Any] = {
    "caption_channels": 3840,
    "text_proj_in_factor": 49,
    "video_connector_num_attention_heads": 30,
    "video_connector_attention_head_dim": 128,
    "video_connector_num_layers": 2,
    "video_connector_num_learnable_registers": 128,
    "video_gated_attn": False,
    "audio_connector_num_attention_heads": 30,
    "audio_connector_attention_head_dim": 128,
    "audio_connector_num_layers": 2,
    "audio_connector_num_learnable_registers": 128,
    "audio_gated_attn": False,
    "connector_rope_base_seq_len": 4096,
    "rope_theta": 10000.0,
    "rope_double_precision": True,
    "rope_type": "interleaved",
    "per_modality_projections": False,
    "video_hidden_dim": 4096,
    "audio_hidden_dim": 2048,
    "proj_bias": False,
}
"""What a config that leaves an option out means by it (diffusers' defaults)."""

_WITHOUT_EFFECT = ("causal_temporal_positioning",)
"""Written by diffusers and read by none of its code."""

_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("LTX2TextConnectors",),
    "rope_type": ("split", "interleaved"),
}
"""Options of which we run only these values."""


def _connector_config(options: Mapping[str, Any], stream: str) -> ConnectorConfig:
    return ConnectorConfig(
        num_heads=options[f"{stream}_connector_num_attention_heads"],
        head_dim=options[f"{stream}_connector_attention_head_dim"],
        num_layers=options[f"{stream}_connector_num_layers"],
        num_registers=options[f"{stream}_connector_num_learnable_registers"],
        has_gates=options[f"{stream}_gated_attn"],
    )


def _check_widths(options: Mapping[str, Any], config: LTX2ConnectorsConfig) -> None:
    """What is projected must have the width of the connector that takes it."""
    for stream, own in (("video", config.video), ("audio", config.audio)):
        is_own = config.has_projection_for_each
        name = f"{stream}_hidden_dim" if is_own else "caption_channels"
        if options[name] != own.dim:
            raise ModelError(
                f"{COMPONENT} config: {name} is {options[name]}; it must be the width of the "
                f"{stream} connector, {own.num_heads} heads of {own.head_dim}"
            )
        if own.head_dim % 2:
            raise ModelError(
                f"{COMPONENT} config: {stream}_connector_attention_head_dim is "
                f"{own.head_dim}; it must be even"
            )
