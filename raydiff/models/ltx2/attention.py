"""LTX-2's attentions: of a stream to itself, to the text, and to the other stream.

Queries and keys are normalised over all heads together, then turned by position.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydiff.models.fp8_linear import Fp8Linear, concatenate_fp8_linears
from raydiff.models.ltx2.rope import Rotation, rotate


class Attention(nn.Module):
    """Projections of any of the attentions; parameters have the checkpoints' names."""

    def __init__(
        self,
        query_dim: int,
        source_dim: int,
        *,
        num_heads: int,
        head_dim: int,
        norm_eps: float,
        has_gates: bool,
        rope_type: Literal["split", "interleaved"],
    ) -> None:
        super().__init__()
        inner_dim = num_heads * head_dim
        self.num_heads = num_heads
        self.rope_type: Literal["split", "interleaved"] = rope_type
        self.norm_q = nn.RMSNorm(inner_dim, eps=norm_eps)
        self.norm_k = nn.RMSNorm(inner_dim, eps=norm_eps)
        self.to_q = nn.Linear(query_dim, inner_dim)
        self.to_k = nn.Linear(source_dim, inner_dim)
        self.to_v = nn.Linear(source_dim, inner_dim)
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, query_dim)])
        self.to_gate_logits = nn.Linear(query_dim, num_heads) if has_gates else None
        self.fused: nn.Linear | Fp8Linear | None = None

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, inner_dim) -> (B, N, heads, head_dim), a view."""
        return x.unflatten(-1, (self.num_heads, -1))

    def _query(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        return self._turned(self.norm_q(x), rotation)

    def _key(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        return self._turned(self.norm_k(x), rotation)

    def _turned(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        heads = self._heads(x)
        return heads if rotation is None else rotate(heads, rotation, self.rope_type)

    def _output(self, x: Tensor, attended: Tensor) -> Tensor:
        """attended (B, N, heads, head_dim), gated by the attention's own input x (B, N, C)."""
        if self.to_gate_logits is not None:
            # Twice the sigmoid: a gate whose logit is 0 lets its head through unchanged.
            gates = 2.0 * torch.sigmoid(self.to_gate_logits(x))  # (B, N, heads)
            attended = attended * gates[..., None]
        return self.to_out[0](attended.flatten(2))


class SelfAttention(Attention):
    """Attention of every token of a stream to every other."""

    def forward(self, x: Tensor, rotation: Rotation, perturbed: Tensor | None = None) -> Tensor:
        """x (B, N, C) -> (B, N, C).

        In rows that `perturbed` (B,) marks, each token keeps its own value instead of attending:
        the weaker prediction that spatio-temporal guidance leads away from.
        """
        if self.fused is not None:
            query, key, value = self.fused(x).chunk(3, dim=-1)
        else:
            query, key, value = self.to_q(x), self.to_k(x), self.to_v(x)
        value = self._heads(value)
        attended = attend(self._query(query, rotation), self._key(key, rotation), value)
        if perturbed is not None:
            attended = torch.where(perturbed[:, None, None, None], value, attended)
        return self._output(x, attended)

    def fuse_projections(self) -> None:
        """Replace to_q, to_k and to_v by one linear layer, once."""
        if self.fused is None:
            self.fused = concatenate_linears(self.to_q, self.to_k, self.to_v)
            del self.to_q, self.to_k, self.to_v


class SourceAttention(Attention):
    """Attention to tokens from elsewhere, whose keys and values are projected together."""

    def fuse_projections(self) -> None:
        """Replace to_k and to_v by one linear layer, once."""
        if self.fused is None:
            self.fused = concatenate_linears(self.to_k, self.to_v)
            del self.to_k, self.to_v

    def _project(self, source: Tensor) -> tuple[Tensor, Tensor]:
        if self.fused is not None:
            key, value = self.fused(source).chunk(2, dim=-1)
            return key, value
        return self.to_k(source), self.to_v(source)


class TextAttention(SourceAttention):
    """Attention of a stream to the text, all of whose tokens count."""

    def keys_values(self, text: Tensor) -> Tensor:
        """(T, S, C) -> (T, S, 2 * inner_dim): normalised keys, then values."""
        key, value = self._project(text)
        return torch.cat([self.norm_k(key), value], dim=-1)

    def forward(self, x: Tensor, keys_values: Tensor) -> Tensor:
        """x (B, N, C), keys_values (B, S, 2 * inner_dim) -> (B, N, C)."""
        key, value = keys_values.chunk(2, dim=-1)
        query = self._query(self.to_q(x), None)
        return self._output(x, attend(query, self._heads(key), self._heads(value)))


class CrossModalAttention(SourceAttention):
    """Attention of one stream to the other, by their positions in time."""

    def forward(
        self, x: Tensor, source: Tensor, rotation: Rotation, source_rotation: Rotation
    ) -> Tensor:
        """x (B, N, C), source (B, M, C') -> (B, N, C)."""
        key, value = self._project(source)
        query = self._query(self.to_q(x), rotation)
        attended = attend(query, self._key(key, source_rotation), self._heads(value))
        return self._output(x, attended)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B, N, heads, D) and twice (B, S, heads, D) -> (B, N, heads, D); heads are strided views."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def concatenate_linears(*layers: nn.Linear | Fp8Linear) -> nn.Linear | Fp8Linear:
    """One layer whose output is the layers' outputs side by side; in fp8 if all of them are."""
    fp8 = [layer for layer in layers if isinstance(layer, Fp8Linear)]
    if len(fp8) == len(layers):
        return concatenate_fp8_linears(fp8)
    dtype = next(layer.weight.dtype for layer in layers if layer not in fp8)
    weight = torch.cat(
        [
            layer.full_weight().to(dtype) if isinstance(layer, Fp8Linear) else layer.weight.detach()
            for layer in layers
        ]
    )
    fused = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    fused.weight = nn.Parameter(weight, requires_grad=False)
    bias = torch.cat([layer.bias.detach() for layer in layers if layer.bias is not None])
    fused.bias = nn.Parameter(bias, requires_grad=False)
    return fused
