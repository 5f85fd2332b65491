"""Layers of LTX-2's video VAE. They take a clip whole or in chunks of frames and give the same
frames either way: a `Carry` keeps what each layer still needs of the chunks before.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydiff.models.ltx2.video_vae_config import Factors, PaddingMode

NORM_EPS = 1e-8
"""Added to the mean square: the value of the original code, in no config file."""


@dataclass(kw_only=True, slots=True)
class Carry:
    """What the layers keep from chunk to chunk, in one pass over one clip."""

    is_ending: bool
    """No frames follow: a layer that waits for more gives what it has left."""
    frames: dict[nn.Module, Tensor] = field(default_factory=dict)
    begun: set[nn.Module] = field(default_factory=set)

    def begins(self, layer: nn.Module) -> bool:
        """Say once for each layer that its clip begins."""
        is_first = layer not in self.begun
        self.begun.add(layer)
        return is_first

    def delay(self, layer: nn.Module, frames: Tensor, num_frames: int) -> Tensor:
        """Take `frames` in and give the oldest `num_frames` out; the others wait."""
        waiting = self.frames.pop(layer, None)
        if waiting is not None:
            frames = torch.cat((waiting, frames), dim=2)
        if not self.is_ending:
            self.frames[layer] = frames[:, :, num_frames:].clone()
        return frames[:, :, :num_frames]


Stage = Callable[[Tensor, Carry], Tensor]
"""Part of a network: frames (B, C, F, H, W) in, those that they complete out, perhaps none."""


def run_whole(stages: Sequence[Stage], clip: Tensor) -> Tensor:
    """Run the stages on all frames at once."""
    carry = Carry(is_ending=True)
    for stage in stages:
        clip = stage(clip, carry)
    return clip


def run_in_chunks(stages: Sequence[Stage], chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Run the stages chunk by chunk and yield the frames of `run_whole` in order.

    Memory is a chunk's, whatever the clip's length: also at the end, where stages give up what they
    held one after another and not all at once.
    """
    carry = Carry(is_ending=False)
    nothing: dict[int, Tensor] = {}

    def push(frames: Tensor, start: int) -> Iterator[Tensor]:
        for position in range(start, len(stages)):
            if not frames.shape[2]:
                return
            if position not in nothing:
                nothing[position] = frames.new_empty((*frames.shape[:2], 0, *frames.shape[3:]))
            frames = stages[position](frames, carry)
        if frames.shape[2]:
            yield frames

    for chunk in chunks:
        yield from push(chunk, 0)
    for position, stage in enumerate(stages):
        carry.is_ending = True
        rest = stage(nothing[position], carry)
        carry.is_ending = False
        yield from push(rest, position + 1)


class ClipConv(nn.Module):
    """A 3x3x3 convolution that keeps the size. Before the clip it sees the first frame again.

    It sees that frame twice if causal; else once, and after the clip the last frame again.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        is_causal: bool,
        padding_mode: PaddingMode,
    ) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.is_reflecting = padding_mode == "reflect"
        padding = 0 if self.is_reflecting else (0, 1, 1)
        self.conv = nn.Conv3d(in_channels, channels, 3, padding=padding)

    def forward(self, frames: Tensor, carry: Carry) -> Tensor:
        before = carry.frames.pop(self, None)
        if before is None:
            if not frames.shape[2]:
                return self._no_frames(frames)
            before = frames[:, :, :1].expand(-1, -1, 2 if self.is_causal else 1, -1, -1)
        parts = [before, frames]
        if not carry.is_ending:
            carry.frames[self] = torch.cat((before, frames[:, :, -2:]), dim=2)[:, :, -2:].clone()
        elif not self.is_causal:
            parts.append((frames if frames.shape[2] else before)[:, :, -1:])
        if sum(part.shape[2] for part in parts) < 3:
            return self._no_frames(frames)
        return self.conv(self._padded(parts))

    def _no_frames(self, frames: Tensor) -> Tensor:
        batch, _, _, height, width = frames.shape
        return frames.new_empty((batch, self.conv.out_channels, 0, height, width))

    def _padded(self, parts: Sequence[Tensor]) -> Tensor:
        """Join `parts` and mirror the edges in one copy; zeros are left to the convolution."""
        edge = int(self.is_reflecting)
        batch, channels, _, height, width = parts[0].shape
        num_frames = sum(part.shape[2] for part in parts)
        padded = torch.empty(
            (batch, channels, num_frames, height + 2 * edge, width + 2 * edge),
            dtype=parts[0].dtype,
            device=parts[0].device,
            memory_format=torch.channels_last_3d,
        )
        inner = padded[..., edge : edge + height, edge : edge + width]
        start = 0
        for part in parts:
            inner[:, :, start : start + part.shape[2]] = part
            start += part.shape[2]
        if self.is_reflecting:
            padded[..., 0, :], padded[..., -1, :] = padded[..., 2, :], padded[..., -3, :]
            padded[..., 0], padded[..., -1] = padded[..., 2], padded[..., -3]
        return padded


ConvFactory = Callable[[int, int], ClipConv]
"""Makes a convolution from its input's and its output's channels."""


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, channels: int, conv: ConvFactory) -> None:
        super().__init__()
        self.conv1 = conv(channels, channels)
        self.conv2 = conv(channels, channels)

    def forward(self, frames: Tensor, carry: Carry) -> Tensor:
        hidden = self.conv1(normalize_silu(frames), carry)
        hidden = self.conv2(normalize_silu(hidden), carry)
        return hidden.add_(carry.delay(self, frames, hidden.shape[2]))


def normalize_silu(x: Tensor) -> Tensor:
    """silu(x / RMS of the channels) of x (B, C, F, H, W); channels come out last in memory."""
    normal = F.rms_norm(x.movedim(1, -1), (x.shape[1],), eps=NORM_EPS)
    return F.silu(normal, inplace=True).movedim(-1, 1)


class Downsample(nn.Module):
    """A convolution whose frames, rows and columns fold into channels, plus the mean of the folded
    input in groups of channels. A clip's first frame counts twice where frames fold in pairs.
    """

    def __init__(
        self, in_channels: int, channels: int, factors: Factors, conv: ConvFactory
    ) -> None:
        super().__init__()
        self.factors = factors
        self.group_size = in_channels * prod(factors) // channels
        self.conv = conv(in_channels, channels // prod(factors))

    def forward(self, frames: Tensor, carry: Carry) -> Tensor:
        if carry.begins(self):
            frames = torch.cat((frames[:, :, : self.factors[0] - 1], frames), dim=2)
        mean = fold(frames, self.factors).unflatten(1, (-1, self.group_size)).mean(2)
        return fold(self.conv(frames, carry), self.factors).add_(mean)


class Upsample(nn.Module):
    """A convolution whose channels unfold into frames, rows and columns, with or without the input
    unfolded in the same way. A clip loses its first frame where one becomes two.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        factors: Factors,
        conv: ConvFactory,
        *,
        has_residual: bool,
    ) -> None:
        super().__init__()
        self.factors = factors
        self.has_residual = has_residual
        self.conv = conv(in_channels, channels * prod(factors))

    def forward(self, frames: Tensor, carry: Carry) -> Tensor:
        hidden = self.conv(frames, carry)
        num_frames = hidden.shape[2]
        hidden = unfold(hidden, self.factors)
        if self.has_residual:
            residual = unfold(carry.delay(self, frames, num_frames), self.factors)
            # The residual has fewer channels, and is added to each run of as many.
            hidden.unflatten(1, (-1, residual.shape[1])).add_(residual.unsqueeze(1))
        if num_frames and carry.begins(self):
            hidden = hidden[:, :, self.factors[0] - 1 :]
        return hidden


def fold(clip: Tensor, factors: Factors) -> Tensor:
    """(B, C, F, H, W) -> (B, C * f * h * w, F / f, H / h, W / w), channels in that order."""
    parts = clip.movedim(1, -1)
    for axis, factor in zip((1, 3, 5), factors, strict=True):
        parts = parts.unflatten(axis, (-1, factor))  # (B, F / f, f, H / h, h, W / w, w, C)
    return parts.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4).movedim(-1, 1)


def unfold(clip: Tensor, factors: Factors) -> Tensor:
    """Undo `fold`: (B, C * f * h * w, F, H, W) -> (B, C, F * f, H * h, W * w)."""
    parts = clip.movedim(1, -1).unflatten(-1, (-1, *factors))  # (B, F, H, W, C, f, h, w)
    parts = parts.permute(0, 1, 5, 2, 6, 3, 7, 4)  # (B, F, f, H, h, W, w, C)
    return parts.flatten(5, 6).flatten(3, 4).flatten(1, 2).movedim(-1, 1)
