"""LTX-2's vocoder: log-mel spectrograms to sound, (B, 2, T, 64) -> (B, 2, samples) in -1..1.

To be loaded in float32, as LTX-2's authors run it. Inference only; parameter names are the
diffusers checkpoint's. Sources: HiFi-GAN (arXiv 2010.05646) for 2.0, the anti-aliased periodic
activations of BigVGAN (arXiv 2206.04658) for 2.3.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydiff.models.ltx2.vocoder_config import VocoderConfig, VocoderWithBWEConfig

LAST_SLOPE = 0.01
"""Of the leaky ReLU before the last convolution: not the config's, as the original was trained."""

SNAKE_EPS = 1e-9

MEL_FLOOR = 1e-5

RESAMPLER_WIDTH = 6
"""Zero crossings on each side of the filter between two sampling rates (torchaudio's default)."""

RESAMPLER_ROLLOFF = 0.99
"""Its cutoff, in half the lower rate."""


def build_vocoder(config: Mapping[str, Any]) -> "Vocoder | VocoderWithBWE":
    """Build what a `vocoder/config.json` describes; ModelError for what we do not run."""
    if config.get("_class_name") == "LTX2VocoderWithBWE":
        return VocoderWithBWE(VocoderWithBWEConfig.from_dict(config))
    return Vocoder(VocoderConfig.from_dict(config))


class Vocoder(nn.Module):
    """Each step enlarges the time axis and runs residual blocks of several widths side by side."""

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.config = config
        self.conv_in = nn.Conv1d(config.in_channels, config.hidden_channels, 7, padding=3)
        self.upsamplers = nn.ModuleList()
        self.resnets = nn.ModuleList()
        channels = config.hidden_channels
        for kernel_size, factor in zip(
            config.upsample_kernel_sizes, config.upsample_factors, strict=True
        ):
            padding = (kernel_size - factor) // 2
            self.upsamplers.append(
                nn.ConvTranspose1d(channels, channels // 2, kernel_size, factor, padding)
            )
            channels //= 2
            self.resnets.extend(
                ResBlock(config, channels, kernel_size=size, dilations=dilations)
                for size, dilations in zip(
                    config.resnet_kernel_sizes, config.resnet_dilations, strict=True
                )
            )
        self.act_out = _activation(config, channels, slope=LAST_SLOPE)
        self.conv_out = nn.Conv1d(
            channels, config.out_channels, 7, padding=3, bias=config.final_bias
        )
        self.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which the network computes."""
        return self.conv_in.weight.dtype

    def forward(self, mel: Tensor) -> Tensor:
        """(B, sound channels, T, mel bins) -> (B, sound channels, T * samples_per_frame)."""
        config = self.config
        hidden = self.conv_in(mel.to(self.dtype).transpose(2, 3).flatten(1, 2))
        for upsampler, blocks in self._steps():
            if config.act_fn == "leaky_relu":
                hidden = F.leaky_relu(hidden, config.leaky_relu_negative_slope)
            hidden = upsampler(hidden)  # (B, C / 2, T * factor)
            first, *others = blocks
            total = first(hidden)
            for block in others:
                total += block(hidden)
            hidden = total.div_(len(blocks))
        sound = self.conv_out(self.act_out(hidden))
        if config.final_act_fn == "tanh":
            return sound.tanh_()
        return sound.clamp_(-1, 1) if config.final_act_fn == "clamp" else sound

    def _steps(self) -> "list[tuple[nn.ConvTranspose1d, list[ResBlock]]]":
        count = len(self.config.resnet_kernel_sizes)
        resnets = cast("list[ResBlock]", list(self.resnets))
        groups = [resnets[start : start + count] for start in range(0, len(resnets), count)]
        upsamplers = cast("list[nn.ConvTranspose1d]", list(self.upsamplers))
        return list(zip(upsamplers, groups, strict=True))


class ResBlock(nn.Module):
    """x + conv(act(conv(act(x)))) for each dilation, one after another."""

    def __init__(
        self,
        config: VocoderConfig,
        channels: int,
        *,
        kernel_size: int,
        dilations: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(
            _same_size_conv(channels, kernel_size, dilation) for dilation in dilations
        )
        self.convs2 = nn.ModuleList(_same_size_conv(channels, kernel_size) for _ in dilations)
        slope = config.leaky_relu_negative_slope
        self.acts1 = nn.ModuleList(_activation(config, channels, slope=slope) for _ in dilations)
        self.acts2 = nn.ModuleList(_activation(config, channels, slope=slope) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for act1, conv1, act2, conv2 in zip(
            self.acts1, self.convs1, self.acts2, self.convs2, strict=True
        ):
            x = conv2(act2(conv1(act1(x)))).add_(x)
        return x


def _same_size_conv(channels: int, kernel_size: int, dilation: int = 1) -> nn.Conv1d:
    padding = dilation * (kernel_size // 2)
    return nn.Conv1d(channels, channels, kernel_size, padding=padding, dilation=dilation)


def _activation(config: VocoderConfig, channels: int, *, slope: float) -> nn.Module:
    if config.act_fn == "leaky_relu":
        return nn.LeakyReLU(slope)
    return AntiAliased(
        channels, ratio=config.antialias_ratio, kernel_size=config.antialias_kernel_size
    )


class AntiAliased(nn.Module):
    """The activation at `ratio` times the rate, where its overtones do not fold, and back."""

    def __init__(self, channels: int, *, ratio: int, kernel_size: int) -> None:
        super().__init__()
        self.upsample = Upsample(ratio, kernel_size)
        self.act = SnakeBeta(channels)
        self.downsample = Downsample(ratio, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.act(self.upsample(x)))


class SnakeBeta(nn.Module):
    """x + sin²(e^alpha x) / e^beta, with an alpha and a beta for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(channels))
        self.beta = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        height = 1 / (self.beta.exp() + SNAKE_EPS)
        wave = (x * self.alpha.exp()[:, None]).sin_()
        return torch.addcmul(x, wave.square(), height[:, None])


class Upsample(nn.Module):
    """`ratio` samples for each, through a low-pass filter that the checkpoint has."""

    filter: Tensor

    def __init__(self, ratio: int, kernel_size: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.register_buffer("filter", torch.empty(1, 1, kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        size = self.filter.shape[2]
        margin = size // self.ratio - 1
        start = margin * self.ratio + (size - self.ratio) // 2
        return interpolate(x, self.filter, ratio=self.ratio, margin=margin, start=start)


class Downsample(nn.Module):
    """One sample for every `ratio`, through a low-pass filter that the checkpoint has."""

    filter: Tensor

    def __init__(self, ratio: int, kernel_size: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.register_buffer("filter", torch.empty(1, 1, kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        size, channels = self.filter.shape[2], x.shape[1]
        x = F.pad(x, ((size - 1) // 2, size // 2), mode="replicate")
        taps = self.filter.expand(channels, 1, size)
        return F.conv1d(x, taps, stride=self.ratio, groups=channels)


def interpolate(x: Tensor, taps: Tensor, *, ratio: int, margin: int, start: int) -> Tensor:
    """Filter x (B, C, N), with zeros between its samples, by `taps`: (B, C, ratio * N).

    The ends go on for `margin` samples; `start` is where the result begins in what comes of them.
    """
    num_samples, channels = x.shape[2], x.shape[1]
    x = F.pad(x, (margin, margin), mode="replicate")
    taps = (ratio * taps).expand(channels, 1, -1)
    x = F.conv_transpose1d(x, taps, stride=ratio, groups=channels)
    return x[..., start : start + ratio * num_samples]


class VocoderWithBWE(nn.Module):
    """A vocoder, and a second that adds high frequencies to the first one's resampled sound."""

    def __init__(self, config: VocoderWithBWEConfig) -> None:
        super().__init__()
        self.config = config
        self.vocoder = Vocoder(config.vocoder)
        self.bwe_generator = Vocoder(config.bwe)
        self.mel_stft = CausalMel(config)
        self.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which the networks compute."""
        return self.vocoder.dtype

    def forward(self, mel: Tensor) -> Tensor:
        """(B, sound channels, T, mel bins) -> (B, sound channels, T * samples_per_frame)."""
        low = self.vocoder(mel)
        num_samples = low.shape[2]
        low = F.pad(low, (0, -num_samples % self.config.hop_length))
        high = self.bwe_generator(self.mel_stft(low))
        sound = high.add_(resample(low, self.config.ratio)).clamp_(-1, 1)
        return sound[..., : num_samples * self.config.ratio]


class CausalMel(nn.Module):
    """Log-mel spectrogram (B, C, N / hop_length, mels) of sound (B, C, N), from the checkpoint's
    own tables: a frame sees the samples up to its end and none after."""

    mel_basis: Tensor

    def __init__(self, config: VocoderWithBWEConfig) -> None:
        super().__init__()
        self.hop_length = config.hop_length
        num_frequencies = config.filter_length // 2 + 1
        self.stft_fn = FourierBasis(num_frequencies, config.filter_length)
        self.register_buffer("mel_basis", torch.empty(config.num_mel_channels, num_frequencies))

    def forward(self, sound: Tensor) -> Tensor:
        basis = self.stft_fn.forward_basis
        padded = F.pad(sound.flatten(0, 1), (basis.shape[2] - self.hop_length, 0))
        spectrum = F.conv1d(padded.unsqueeze(1), basis, stride=self.hop_length)
        real, imaginary = spectrum.chunk(2, dim=1)  # (B * C, frequencies, frames)
        mels = self.mel_basis @ torch.hypot(real, imaginary)
        return mels.clamp_(min=MEL_FLOOR).log_().transpose(1, 2).unflatten(0, sound.shape[:2])


class FourierBasis(nn.Module):
    """Windowed cosines, then sines. The way back is in the checkpoint too, and of no use here."""

    forward_basis: Tensor
    inverse_basis: Tensor

    def __init__(self, num_frequencies: int, filter_length: int) -> None:
        super().__init__()
        shape = (2 * num_frequencies, 1, filter_length)
        self.register_buffer("forward_basis", torch.empty(shape))
        self.register_buffer("inverse_basis", torch.empty(shape))


def resample(sound: Tensor, ratio: int) -> Tensor:
    """(B, C, N) -> (B, C, ratio * N), band-limited: a sinc in a Hann window."""
    taps = torch.tensor(_resampling_taps(ratio), dtype=sound.dtype, device=sound.device)
    margin = _resampling_margin()
    return interpolate(
        sound, taps.view(1, 1, -1), ratio=ratio, margin=margin, start=2 * margin * ratio
    )


def _resampling_margin() -> int:
    """Samples of the lower rate on each side of the filter's middle."""
    return math.ceil(RESAMPLER_WIDTH / RESAMPLER_ROLLOFF)


def _resampling_taps(ratio: int) -> list[float]:
    margin = _resampling_margin()
    taps = []
    for index in range(2 * margin * ratio + 1):
        time = (index / ratio - margin) * RESAMPLER_ROLLOFF
        window = math.cos(math.pi / 2 * min(abs(time) / RESAMPLER_WIDTH, 1)) ** 2
        sinc = math.sin(math.pi * time) / (math.pi * time) if time else 1.0
        taps.append(sinc * window * RESAMPLER_ROLLOFF / ratio)
    return taps
