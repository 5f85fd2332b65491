"""The UNet's spatial transformers: self attention, cross attention to the prompt, feed-forward.

The residual stream is (B, N, C) with N = H*W: in channels_last memory a view of the feature map.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydiff.models.geglu import GEGLU
from raydiff.models.group_norm import GroupNorm
from raydiff.models.layer_norm import AddLayerNorm
from raydiff.models.tokens import PointwiseConv, to_image, to_tokens


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, with a residual around them."""

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        num_layers: int,
        cross_attention_dim: int,
        num_groups: int,
        use_linear_projection: bool,
    ) -> None:
        super().__init__()
        projection = nn.Linear if use_linear_projection else PointwiseConv
        # 1e-6 here, 1e-5 in the resnets: as the checkpoints were trained.
        self.norm = GroupNorm(num_groups, channels, eps=1e-6)
        self.proj_in = projection(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, num_heads, cross_attention_dim) for _ in range(num_layers)
        )
        self.proj_out = projection(channels, channels)

    def forward(self, x: Tensor, keys_values: Iterator[Tensor]) -> Tensor:
        """x (B, C, H, W); takes the next `len(transformer_blocks)` items of `keys_values`."""
        tokens = self.proj_in(to_tokens(self.norm(x)))  # (B, N, C)
        update = None
        for block in self.transformer_blocks:
            tokens, update = block(tokens, update, next(keys_values))
        return x + to_image(self.proj_out(tokens + update), x.shape[-2:])


class TransformerBlock(nn.Module):
    """Self attention, cross attention and feed-forward, each on a normalised stream.

    A layer's output joins the stream in the norm before the next layer, one pass for both: so a
    block takes the block before's last output as `update` and leaves its own to the next.
    """

    def __init__(self, channels: int, num_heads: int, cross_attention_dim: int) -> None:
        super().__init__()
        self.norm1 = AddLayerNorm(channels)
        self.attn1 = SelfAttention(channels, num_heads)
        self.norm2 = AddLayerNorm(channels)
        self.attn2 = CrossAttention(channels, num_heads, cross_attention_dim)
        self.norm3 = AddLayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(
        self, x: Tensor, update: Tensor | None, keys_values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x, update (B, N, C) -> the same two after this block, still to be added.

        keys_values (B, S, 2*C) come from `attn2.keys_values(prompt_embeds)`.
        """
        x, normed = self.norm1(x, update)
        x, normed = self.norm2(x, self.attn1(normed))
        x, normed = self.norm3(x, self.attn2(normed, keys_values))
        return x, self.ff(normed)


class SelfAttention(nn.Module):
    """Attention of every pixel to every pixel."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_qkv: nn.Linear | None = None
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        if self.to_qkv is not None:
            query, key, value = self.to_qkv(x).chunk(3, dim=-1)
        else:
            query, key, value = self.to_q(x), self.to_k(x), self.to_v(x)
        return self.to_out[0](attend(query, key, value, self.num_heads))

    def fuse_projections(self) -> None:
        """Replace to_q, to_k and to_v by one linear layer, once."""
        if self.to_qkv is None:
            self.to_qkv = concatenate_linears(self.to_q, self.to_k, self.to_v)
            del self.to_q, self.to_k, self.to_v


class CrossAttention(nn.Module):
    """Attention of every pixel to the prompt, whose keys and values do not depend on the step."""

    def __init__(self, channels: int, num_heads: int, cross_attention_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(cross_attention_dim, channels, bias=False)
        self.to_v = nn.Linear(cross_attention_dim, channels, bias=False)
        self.to_kv: nn.Linear | None = None
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def keys_values(self, prompt_embeds: Tensor) -> Tensor:
        """(B, S, cross_attention_dim) -> (B, S, 2*C): keys, then values."""
        if self.to_kv is not None:
            return self.to_kv(prompt_embeds)
        return torch.cat([self.to_k(prompt_embeds), self.to_v(prompt_embeds)], dim=-1)

    def forward(self, x: Tensor, keys_values: Tensor) -> Tensor:
        """x (B, N, C), keys_values (B, S, 2*C) -> (B, N, C)."""
        key, value = keys_values.chunk(2, dim=-1)
        return self.to_out[0](attend(self.to_q(x), key, value, self.num_heads))

    def fuse_projections(self) -> None:
        """Replace to_k and to_v by one linear layer, once."""
        if self.to_kv is None:
            self.to_kv = concatenate_linears(self.to_k, self.to_v)
            del self.to_k, self.to_v


class FeedForward(nn.Module):
    """GEGLU to four times the width and back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Three entries, as the checkpoints number them: the middle one was dropout.
        self.net = nn.ModuleList(
            [GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.net[2](self.net[0](x))


def attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Multi-head attention: query (B, N, C), key and value (B, S, C) -> (B, N, C).

    Heads are strided views, so fused projections are read where they lie.
    """
    query, key, value = (
        tensor.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, heads, N or S, C / heads)
        for tensor in (query, key, value)
    )
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def concatenate_linears(*layers: nn.Linear) -> nn.Linear:
    """One layer without bias whose output is the layers' outputs side by side."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    fused = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    fused.weight = nn.Parameter(weight, requires_grad=False)
    return fused
