"""LTX-2's audio autoencoder: log-mel spectrograms <-> raw latents, and raw latents <-> the
normalised tokens that diffusion works on. 2.0, 2.3 and 2.5 have one layout. Inference only;
parameter names are the diffusers checkpoint's. Source: HaCohen et al. 2026 (arXiv 2601.03233).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydiff.errors import ModelError
from raydiff.models.autoencoder_kl import Moments
from raydiff.models.options import check_options, check_positive

DOWNSCALE = 4
"""Mel frames, and mel bins, of one latent: fixed by the checkpoints, whatever `ch_mult` says."""

NORM_EPS = 1e-6

_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("AutoencoderKLLTX2Audio",),
    "attn_resolutions": (None, [], ()),
    "causality_axis": ("height",),
    "double_z": (True,),
    "is_causal": (True,),
    "mid_block_add_attention": (False,),
    "norm_type": ("pixel",),
}

_WITHOUT_EFFECT = ("dropout", "resolution")
"""Of training, and of where attention stands, which no checkpoint has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioVAEConfig:
    """Shape of the autoencoder and of its spectrograms; names and defaults are diffusers' own."""

    base_channels: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int = 2
    in_channels: int = 2
    """Sound channels of the encoder's spectrograms."""
    output_channels: int = 2
    """Those of the decoder's."""
    latent_channels: int = 8
    mel_bins: int = 64
    sample_rate: int = 16000
    """Samples in a second of the sound that the spectrogram describes."""
    mel_hop_length: int = 160
    """Samples from one mel frame to the next."""

    def __post_init__(self) -> None:
        for f in fields(self):
            check_positive("audio_vae", f.name, getattr(self, f.name))
        if self.mel_bins % DOWNSCALE:
            raise ModelError(
                f"audio_vae config: mel_bins is {self.mel_bins}; it must be a multiple of "
                f"{DOWNSCALE}. Check audio_vae/config.json."
            )
        if self.base_channels != self.token_channels:
            raise ModelError(
                f"audio_vae config: base_channels is {self.base_channels}; the statistics of the "
                f"latents have that many values and a token {self.token_channels}, latent_channels "
                f"* mel_bins / {DOWNSCALE}. Check audio_vae/config.json."
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "AudioVAEConfig":
        """Read diffusers' `audio_vae/config.json`; ModelError for an option we do not run."""
        names = [f.name for f in fields(cls)]
        check_options("audio_vae", config, known=(*names, *_WITHOUT_EFFECT), accepted=_ACCEPTED)
        values = {name: config[name] for name in names if name in config}
        if "ch_mult" in values:
            values["ch_mult"] = tuple(values["ch_mult"])
        return cls(**values)

    @property
    def latent_mel_bins(self) -> int:
        """Frequencies of one latent frame: 16."""
        return self.mel_bins // DOWNSCALE

    @property
    def token_channels(self) -> int:
        """Width of a token, which is all of one latent frame: 128."""
        return self.latent_channels * self.latent_mel_bins

    @property
    def latents_per_second(self) -> float:
        """25 in all checkpoints."""
        return self.sample_rate / self.mel_hop_length / DOWNSCALE

    def num_latents(self, num_frames: int, frame_rate: float) -> int:
        """Latent frames, which are tokens, of the sound to a clip of `num_frames` pixel frames."""
        return round(num_frames / frame_rate * self.latents_per_second)

    def num_mel_frames(self, num_latents: int) -> int:
        """Mel frames that the decoder makes: one for the first latent frame, four for others."""
        return DOWNSCALE * (num_latents - 1) + 1


class AudioVAE(nn.Module):
    """Log-mel spectrograms (B, 2, 4 T - 3, 64) to raw latents (B, 8, T, 16) and back.

    No mel frame depends on a later one, both ways.
    """

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, config: AudioVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.register_buffer("latents_mean", torch.empty(config.token_channels))
        self.register_buffer("latents_std", torch.empty(config.token_channels))
        self.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which the network computes."""
        return self.decoder.conv_in.conv.weight.dtype

    def encode(self, mel: Tensor) -> Moments:
        """Return the posterior of a log-mel spectrogram; its mean is what diffusion starts from."""
        mean, logvar = self.encoder(mel.to(self.dtype)).chunk(2, dim=1)  # (B, C, T, M / 4)
        return Moments(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, latents: Tensor) -> Tensor:
        """Return the log-mel spectrogram of raw latents (see `denormalize` and `unpack`)."""
        config = self.config
        mel = self.decoder(latents.to(self.dtype))
        num_frames = config.num_mel_frames(latents.shape[2])
        # A network that enlarges by less than 4 leaves the rest empty, as the reference does; by 4
        # it has this size already. F.pad cuts where a number is negative.
        return F.pad(mel, (0, config.mel_bins - mel.shape[3], 0, num_frames - mel.shape[2]))

    def normalize(self, tokens: Tensor) -> Tensor:
        """Turn packed raw latents (B, T, 128) into the tokens that diffusion works on."""
        return (tokens - self.latents_mean.to(tokens)) / self.latents_std.to(tokens)

    def denormalize(self, tokens: Tensor) -> Tensor:
        """Undo `normalize`."""
        return tokens * self.latents_std.to(tokens) + self.latents_mean.to(tokens)

    def pack(self, latents: Tensor) -> Tensor:
        """(B, C, T, M) -> (B, T, C * M), one token for each latent frame."""
        return latents.transpose(1, 2).flatten(2)

    def unpack(self, tokens: Tensor) -> Tensor:
        """Undo `pack`."""
        return tokens.unflatten(2, (-1, self.config.latent_mel_bins)).transpose(1, 2)


class Encoder(nn.Module):
    """(B, 2, T, 64) -> (B, 2 * 8, T / 4, 16), mean and log variance; T rounded up."""

    def __init__(self, config: AudioVAEConfig) -> None:
        super().__init__()
        widths = [config.base_channels * factor for factor in config.ch_mult]
        self.conv_in = CausalConv(config.in_channels, config.base_channels)
        self.down = nn.ModuleList(
            DownLevel(
                in_channels,
                width,
                num_blocks=config.num_res_blocks,
                has_downsample=level < len(widths) - 1,
            )
            for level, (in_channels, width) in enumerate(pairwise([config.base_channels, *widths]))
        )
        self.mid = MidBlock(widths[-1])
        self.conv_out = CausalConv(widths[-1], 2 * config.latent_channels)

    def forward(self, mel: Tensor) -> Tensor:
        hidden = self.conv_in(mel)
        for level in self.down:
            hidden = level(hidden)  # (B, width, T / 2, M / 2)
        return self.conv_out(normalize_silu(self.mid(hidden)))


class Decoder(nn.Module):
    """(B, 8, T, 16) -> (B, 2, 4 T - 3, 64)."""

    def __init__(self, config: AudioVAEConfig) -> None:
        super().__init__()
        widths = [config.base_channels * factor for factor in config.ch_mult]
        self.conv_in = CausalConv(config.latent_channels, widths[-1])
        self.mid = MidBlock(widths[-1])
        # Numbered from the last to run, as the encoder's from the first.
        self.up = nn.ModuleList(
            UpLevel(
                in_channels, width, num_blocks=config.num_res_blocks + 1, has_upsample=level > 0
            )
            for level, (in_channels, width) in enumerate(
                zip([*widths[1:], widths[-1]], widths, strict=True)
            )
        )
        self.conv_out = CausalConv(widths[0], config.output_channels)

    def forward(self, latents: Tensor) -> Tensor:
        hidden = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            hidden = level(hidden)  # (B, width, 2 T - 1, 2 M)
        return self.conv_out(normalize_silu(hidden))


class DownLevel(nn.Module):
    """Residual blocks and, but for the last level, half the size after them."""

    def __init__(
        self, in_channels: int, channels: int, *, num_blocks: int, has_downsample: bool
    ) -> None:
        super().__init__()
        self.block = _blocks(in_channels, channels, num_blocks)
        self.downsample = Downsample(channels) if has_downsample else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class UpLevel(nn.Module):
    """Residual blocks and, but for the last level to run, twice the size after them."""

    def __init__(
        self, in_channels: int, channels: int, *, num_blocks: int, has_upsample: bool
    ) -> None:
        super().__init__()
        self.block = _blocks(in_channels, channels, num_blocks)
        self.upsample = Upsample(channels) if has_upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.upsample is None else self.upsample(x)


def _blocks(in_channels: int, channels: int, num_blocks: int) -> nn.ModuleList:
    return nn.ModuleList(
        ResnetBlock(in_channels if index == 0 else channels, channels)
        for index in range(num_blocks)
    )


class MidBlock(nn.Module):
    """Two residual blocks at the latents' size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.block_1(x))


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), x by a 1x1 convolution where the widths differ."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = CausalConv(in_channels, channels)
        self.conv2 = CausalConv(channels, channels)
        self.nin_shortcut = (
            CausalConv(in_channels, channels, kernel_size=1) if in_channels != channels else None
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv2(normalize_silu(self.conv1(normalize_silu(x))))
        return hidden.add_(x if self.nin_shortcut is None else self.nin_shortcut(x))


class CausalConv(nn.Module):
    """A convolution over earlier frames, and over mel bins on both sides; zeros beyond both."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        kernel_size: int = 3,
        num_past: int | None = None,
    ) -> None:
        super().__init__()
        self.num_past = kernel_size - 1 if num_past is None else num_past
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=(0, kernel_size // 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 0, self.num_past, 0)) if self.num_past else x)


class Downsample(nn.Module):
    """Stride 2, padded with two earlier frames and one higher mel bin."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 2, 0)))


class Upsample(nn.Module):
    """Each position to 2x2 equal ones and a convolution, without its first frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # One frame of padding less drops the first frame before it is computed.
        self.conv = CausalConv(channels, channels, num_past=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def normalize_silu(x: Tensor) -> Tensor:
    """silu(x / RMS of its channels), x (B, C, T, M)."""
    scale = torch.rsqrt(x.square().mean(1, keepdim=True) + NORM_EPS)
    return F.silu(x * scale, inplace=True)
