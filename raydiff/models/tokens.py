"""Feature maps (B, C, H, W) seen as tokens (B, H*W, C): a view where memory is channels_last."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def to_tokens(image: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C); copies only an image that is not channels_last."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def to_image(tokens: Tensor, size: torch.Size) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W) for `size` (H, W): a channels_last view."""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution applied to tokens: one GEMM that also adds the bias."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, in_channels) -> (B, N, out_channels)."""
        return F.linear(tokens, self.weight.flatten(1), self.bias)
