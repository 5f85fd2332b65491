"""Rotary positions of LTX-2's video and audio tokens, in seconds and pixels.

Positions and frequencies are rounded to float32 where the checkpoints' training code rounds them:
the highest angles are near 16,000, so a last bit more or less there turns a channel visibly.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raydiff.models.ltx2.transformer_config import LTX2TransformerConfig


class LatentSize(NamedTuple):
    """Latent frames, rows and columns of a video: the tokens in that order."""

    num_frames: int
    height: int
    width: int


class Rotation(NamedTuple):
    """How far each head turns its channel pairs at each token: (B, N, heads, head_dim / 2) fp32.

    B is 1 where all rows of a batch share the positions.
    """

    cos: Tensor
    sin: Tensor

    def rows(self, index: Tensor) -> "Rotation":
        """The rotation of the rows in `index` (int64, on the same device), in that order."""
        if self.cos.shape[0] == 1:
            return self
        return Rotation(self.cos.index_select(0, index), self.sin.index_select(0, index))


class Rotations(NamedTuple):
    """Of the self attentions, and of the attentions between the streams, which know time alone."""

    video: Rotation
    audio: Rotation
    video_across: Rotation
    audio_across: Rotation

    def rows(self, index: Tensor) -> "Rotations":
        """The rotations of the rows in `index`, in that order."""
        return Rotations(*(rotation.rows(index) for rotation in self))


def rotations(
    config: LTX2TransformerConfig,
    size: LatentSize,
    num_audio_tokens: int,
    frame_rates: Sequence[float],
    device: torch.device,
) -> Rotations:
    """Rotations of a batch whose rows have these frame rates (per second); one row if all agree."""
    rates = list(frame_rates)
    if len(set(rates)) == 1:
        rates = rates[:1]
    rate = torch.tensor(rates, dtype=torch.float32, device=device)
    seconds = video_seconds(config, size.num_frames, rate)  # (B, F)
    audio = audio_seconds(config, num_audio_tokens, device)[None]  # (1, M)
    across_span = max(config.max_seconds, config.audio_max_seconds)

    def turn(axes: Sequence[Tensor], dim: int, num_heads: int) -> Rotation:
        return _rotation(_angles(config, axes, dim), dim, num_heads)

    tokens_per_frame = size.height * size.width
    across = turn([seconds / across_span], config.audio_dim, config.audio_num_heads)
    return Rotations(
        video=turn(
            [
                (seconds / config.max_seconds)[:, :, None, None],
                (_pixels(size.height, config.vae_scale_factors[1], device) / config.base_height)[
                    None, None, :, None
                ],
                (_pixels(size.width, config.vae_scale_factors[2], device) / config.base_width)[
                    None, None, None, :
                ],
            ],
            config.dim,
            config.num_heads,
        ),
        audio=turn([audio / config.audio_max_seconds], config.audio_dim, config.audio_num_heads),
        video_across=Rotation(
            *(values.repeat_interleave(tokens_per_frame, dim=1) for values in across)
        ),
        audio_across=turn([audio / across_span], config.audio_dim, config.audio_num_heads),
    )


def video_seconds(config: LTX2TransformerConfig, num_frames: int, frame_rates: Tensor) -> Tensor:
    """Middle of each latent frame in seconds: (B,) frames per second -> (B, num_frames).

    The first latent frame stands for one pixel frame, each later one for `vae_scale_factors[0]`.
    """
    bounds = _bounds(num_frames, frame_rates.device) * config.vae_scale_factors[0]
    bounds = (bounds + config.causal_offset - config.vae_scale_factors[0]).clamp(min=0)
    bounds = bounds / frame_rates[:, None]  # (B, F + 1)
    return (bounds[:, :-1] + bounds[:, 1:]) / 2.0


def audio_seconds(config: LTX2TransformerConfig, num_tokens: int, device: torch.device) -> Tensor:
    """Middle of each audio latent in seconds, (num_tokens,): the first is one mel frame long."""
    bounds = _bounds(num_tokens, device) * config.audio_scale_factor
    bounds = (bounds + config.causal_offset - config.audio_scale_factor).clamp(min=0)
    bounds = bounds * config.audio_hop_length / config.audio_sampling_rate
    return (bounds[:-1] + bounds[1:]) / 2.0


def rotate(x: Tensor, rotation: Rotation, rope_type: Literal["split", "interleaved"]) -> Tensor:
    """Turn the channel pairs of x (B, N, heads, head_dim), computed in fp32.

    "split" pairs channel i with i + head_dim / 2, "interleaved" 2*i with 2*i + 1.
    """
    cos, sin = rotation
    if rope_type == "split":
        first, second = x.chunk(2, dim=-1)
    else:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    # The rotation's fp32 makes these fp32 too, without a copy of x in fp32.
    turned_first = torch.addcmul(first * cos, second, sin, value=-1).to(x.dtype)
    turned_second = torch.addcmul(second * cos, first, sin).to(x.dtype)
    if rope_type == "split":
        return torch.cat([turned_first, turned_second], dim=-1)
    return torch.stack([turned_first, turned_second], dim=-1).flatten(-2)


def _angles(config: LTX2TransformerConfig, axes: Sequence[Tensor], dim: int) -> list[Tensor]:
    """Angle of each position (a fraction of its span) at each frequency: the shape, then K more.

    Every axis has the same K = dim / 2 / len(axes) frequencies, pi/2 to theta * pi/2.
    """
    dtype = torch.float64 if config.has_double_precision_rope else torch.float32
    exponents = torch.linspace(0.0, 1.0, dim // (2 * len(axes)), dtype=dtype, device=axes[0].device)
    frequencies = torch.pow(config.rope_theta, exponents) * math.pi / 2.0
    frequencies = frequencies.to(torch.float32)
    return [(axis[..., None] * 2 - 1) * frequencies for axis in axes]


def _rotation(angles: Sequence[Tensor], dim: int, num_heads: int) -> Rotation:
    """Spread the axes over the tokens, frequency by frequency, and share them out to the heads.

    Where the axes do not fill dim / 2, the first slots stay unturned.
    """

    def spread(values: Sequence[Tensor], unturned: float) -> Tensor:
        joined = torch.stack(torch.broadcast_tensors(*values), dim=-1)  # (B, F, h, w, K, axes)
        tokens = joined.flatten(-2).flatten(1, -2)  # (B, N, K * axes)
        padded = F.pad(tokens, (dim // 2 - tokens.shape[-1], 0), value=unturned)
        return padded.unflatten(-1, (num_heads, -1))

    return Rotation(
        cos=spread([angle.cos() for angle in angles], 1.0),
        sin=spread([angle.sin() for angle in angles], 0.0),
    )


def _pixels(count: int, scale: int, device: torch.device) -> Tensor:
    """Middle of each of `count` latents of `scale` pixels, in pixels."""
    bounds = _bounds(count, device) * scale
    return (bounds[:-1] + bounds[1:]) / 2.0


def _bounds(count: int, device: torch.device) -> Tensor:
    return torch.arange(count + 1, dtype=torch.float32, device=device)
