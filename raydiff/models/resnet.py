"""The UNet's convolutional parts: residual block, downsampling, upsampling."""

import torch
from torch import Tensor, nn

from raydiff.models.feature_map import add_maps, enlarge_nearest
from raydiff.models.group_norm import GroupNorm
from raydiff.models.tokens import PointwiseConv, to_image, to_tokens


class ResnetBlock(nn.Module):
    """Two normalised convolutions with the time embedding between them, and a residual."""

    def __init__(
        self, in_channels: int, out_channels: int, time_dim: int, *, num_groups: int, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(num_groups, in_channels, eps=eps, silu=True)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, out_channels)
        self.norm2 = GroupNorm(num_groups, out_channels, eps=eps, silu=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        has_shortcut = in_channels != out_channels
        self.conv_shortcut = PointwiseConv(in_channels, out_channels) if has_shortcut else None
        self.conv2_bias: Tensor | None = None

    def forward(self, x: Tensor, time_activation: Tensor) -> Tensor:
        """x (B, in, H, W), time_activation = silu(time embedding) (B, T) -> (B, out, H, W)."""
        hidden = self.conv1(self.norm1(x))
        hidden = self.norm2(hidden, shift=self.time_emb_proj(time_activation))
        hidden = self.conv2(hidden)
        if self.conv_shortcut is not None:
            x = to_image(self.conv_shortcut(to_tokens(x)), x.shape[-2:])
        return add_maps(x, hidden, self.conv2_bias)

    @torch.no_grad()
    def fold_biases(self) -> None:
        """Take both convolutions' biases to where a later operation adds them for free.

        A convolution's bias is a pass of its own over the map in eager torch.
        """
        if self.conv1.bias is not None:
            self.time_emb_proj.bias.add_(self.conv1.bias)
            self.conv1.bias = None
        if self.conv2.bias is not None:
            self.conv2_bias = take_bias(self.conv2, self.conv_shortcut)


def take_bias(conv: nn.Conv2d, shortcut: PointwiseConv | None) -> Tensor | None:
    """Take the bias of a residual's last convolution to its shortcut; return it where there is no
    bias to add it to."""
    bias, conv.bias = conv.bias, None
    if bias is None or shortcut is None or shortcut.bias is None:
        return bias
    shortcut.bias = nn.Parameter(shortcut.bias + bias, requires_grad=False)
    return None


class Downsample(nn.Module):
    """Halve height and width (rounding up) with a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2))."""
        return self.conv(x)


class Upsample(nn.Module):
    """Enlarge to a given size with nearest neighbours, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """(B, C, H, W) -> (B, C, *size); `size` is the next skip's, which may be odd."""
        return self.conv(enlarge_nearest(x, (size[0], size[1])))
