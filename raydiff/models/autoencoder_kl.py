"""The KL autoencoder of Stable Diffusion (1, 2, XL, 3) and FLUX.1: pixels <-> raw latents, and raw
latents <-> the normalised ones that diffusion works on. Inference only; parameter names are the
diffusers checkpoint's. Source: Rombach et al. 2022 (arXiv 2112.10752).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydiff.errors import ModelError
from raydiff.models.feature_map import add_maps, enlarge_nearest, use_channels_last
from raydiff.models.group_norm import GroupNorm
from raydiff.models.resnet import take_bias
from raydiff.models.tokens import PointwiseConv, to_image, to_tokens

NORM_EPS = 1e-6
"""Every GroupNorm of this family, in all published checkpoints (the UNet's resnets have 1e-5)."""

MAX_ATTENTION_SCORES = 2**28
"""Most query-key pairs in one attention call: 1 GiB of float32 if no blockwise kernel applies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderKLConfig:
    """Shape of the autoencoder and the statistics of its latents; names are diffusers' own."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    scaling_factor: float = 0.18215
    """SD 1 and 2; their first config files leave it out."""
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    """Whether the decoder may overflow in float16 (SDXL); the module itself never changes dtype."""

    def __post_init__(self) -> None:
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ModelError(
                    f"vae config: block_out_channels has {channels}; each must be a multiple of "
                    f"norm_num_groups, {self.norm_num_groups}. Check vae/config.json."
                )
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.latent_channels:
                raise ModelError(
                    f"vae config: {name} has {len(values)} values; it needs one for each of the "
                    f"{self.latent_channels} latent channels. Check vae/config.json."
                )
        if (self.latents_mean is None) != (self.latents_std is None):
            raise ModelError(
                "vae config: only one of latents_mean and latents_std is given; they go together. "
                "Give both or neither in vae/config.json."
            )
        if self.shift_factor is not None and self.latents_mean is not None:
            raise ModelError(
                f"vae config: shift_factor is {self.shift_factor} and latents_mean is given too; "
                "they are rival ways to centre latents. Keep one of them in vae/config.json."
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "AutoencoderKLConfig":
        """Read diffusers' `vae/config.json`; keys that do not shape inference are ignored.

        Raises ModelError for another autoencoder class, block type or activation.
        """
        class_name = config.get("_class_name", "AutoencoderKL")
        if class_name != "AutoencoderKL":
            raise ModelError(
                f"vae config: _class_name is {class_name}; only AutoencoderKL is supported. "
                "Use a Stable Diffusion or FLUX.1 autoencoder."
            )
        if config.get("act_fn", "silu") not in ("silu", "swish"):
            raise ModelError(
                f"vae config: act_fn is {config['act_fn']}; only silu is supported. "
                "Use a Stable Diffusion or FLUX.1 autoencoder."
            )
        values = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        for name in ("block_out_channels", "latents_mean", "latents_std"):
            if name in values:
                values[name] = tuple(values[name])
        result = cls(**values)
        num_blocks = len(result.block_out_channels)
        _check_blocks(config, "down_block_types", "DownEncoderBlock2D", num_blocks)
        _check_blocks(config, "up_block_types", "UpDecoderBlock2D", num_blocks)
        return result

    @property
    def downscale(self) -> int:
        """Pixels along one side of a latent: 8 with four blocks."""
        return 2 ** (len(self.block_out_channels) - 1)


def _check_blocks(config: Mapping[str, Any], key: str, supported: str, num_blocks: int) -> None:
    block_types = config.get(key, (supported,) * num_blocks)
    unsupported = sorted(set(block_types) - {supported})
    if unsupported:
        raise ModelError(
            f"vae config: {key} has {', '.join(unsupported)}; only {supported} is supported. "
            "Use a Stable Diffusion or FLUX.1 autoencoder."
        )
    if len(block_types) != num_blocks:
        raise ModelError(
            f"vae config: {key} has {len(block_types)} blocks and block_out_channels {num_blocks}; "
            "the counts must be equal. Check vae/config.json."
        )


class Moments(NamedTuple):
    """A diagonal Gaussian over raw latents: mean and log variance, each (B, C, h, w)."""

    mean: Tensor
    logvar: Tensor


class AutoencoderKL(nn.Module):
    """Pixels (B, 3, H, W) in -1..1 to raw latents (B, C, H // 8, W // 8) and back.

    Each way has a part at the latents' size, with attention over the whole image, and a part of
    convolutions between sizes, which is nearly all of the time and memory and can run in tiles.
    """

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        self.config = config
        self.is_channels_last = False
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        channels = config.latent_channels
        self.quant_conv = (
            nn.Conv2d(2 * channels, 2 * channels, 1) if config.use_quant_conv else None
        )
        self.post_quant_conv = (
            nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else None
        )
        self.requires_grad_(False)

    def encode(self, pixels: Tensor) -> Moments:
        """Return the posterior of `pixels`; rows and columns past a multiple of 8 add no latent."""
        return self.moments(self.downsample(pixels))

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels, about -1..1 but not clamped, of raw `latents` (see `denormalize`)."""
        return self.upsample(self.expand(latents))

    def downsample(self, pixels: Tensor) -> Tensor:
        """First part of `encode`: pixels to a map (B, width, h, w)."""
        return self.encoder.downsample(self._as_stored(pixels))

    def moments(self, hidden: Tensor) -> Moments:
        """Second part of `encode`, at the latents' size."""
        hidden = self.encoder.compress(hidden)  # (B, 2C, h, w)
        if self.quant_conv is not None:
            hidden = self.quant_conv(hidden)
        mean, logvar = hidden.chunk(2, dim=1)
        return Moments(mean, logvar.clamp(-30.0, 20.0))

    def expand(self, latents: Tensor) -> Tensor:
        """First part of `decode`, at the latents' size: to a map (B, width, h, w)."""
        latents = self._as_stored(latents)
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder.expand(latents)

    def upsample(self, hidden: Tensor) -> Tensor:
        """Second part of `decode`: the map to pixels."""
        return self.decoder.upsample(hidden)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which the network computes."""
        return self.decoder.conv_in.weight.dtype

    def _as_stored(self, image: Tensor) -> Tensor:
        layout = torch.channels_last if self.is_channels_last else torch.contiguous_format
        return image.to(self.dtype).contiguous(memory_format=layout)

    def normalize(self, raw: Tensor) -> Tensor:
        """Turn the encoder's latents into those that diffusion works on: about unit variance."""
        config = self.config
        if config.latents_mean is None or config.latents_std is None:
            return (raw - (config.shift_factor or 0.0)) * config.scaling_factor
        # Python scalars per channel: a tensor of them would be a copy from host to device.
        channels = zip(raw.unbind(1), config.latents_mean, config.latents_std, strict=True)
        return torch.stack(
            [(x - mean) * config.scaling_factor / std for x, mean, std in channels], 1
        )

    def denormalize(self, latents: Tensor) -> Tensor:
        """Undo `normalize`."""
        config = self.config
        if config.latents_mean is None or config.latents_std is None:
            return latents / config.scaling_factor + (config.shift_factor or 0.0)
        channels = zip(latents.unbind(1), config.latents_mean, config.latents_std, strict=True)
        return torch.stack([x * std / config.scaling_factor + mean for x, mean, std in channels], 1)

    def prepare_for_inference(self, channels_last: bool) -> None:
        """Fuse the attention projections, fold biases and order memory, in place.

        Call it after the weights are loaded: parameter names are no longer the checkpoint's.
        channels_last is the layout of CUDA's tensor-core convolutions.
        """
        self.is_channels_last = channels_last
        self.requires_grad_(False)
        for module in list(self.modules()):
            if isinstance(module, Attention):
                module.fuse_projections()
            elif isinstance(module, ResnetBlock):
                module.fold_biases()
        if channels_last:
            use_channels_last(self)


def sample(moments: Moments, noise: Tensor) -> Tensor:
    """Return the raw latents that standard normal `noise` (B, C, h, w) picks from the posterior."""
    return moments.mean + torch.exp(0.5 * moments.logvar) * noise


class Encoder(nn.Module):
    """Pixels to the concatenated mean and log variance; halves the size between blocks."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        groups = config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(
                widths[max(i - 1, 0)],
                width,
                num_layers=config.layers_per_block,
                groups=groups,
                has_downsampler=i < len(widths) - 1,
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups, has_attention=config.mid_block_add_attention)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=NORM_EPS, silu=True)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def downsample(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, width, h, w): all blocks but the last, which keeps the size."""
        hidden = self.conv_in(pixels)
        for block in self.down_blocks[:-1]:
            hidden = block(hidden)  # (B, width, H / 2, W / 2)
        return hidden

    def compress(self, hidden: Tensor) -> Tensor:
        """(B, width, h, w) -> (B, 2C, h, w)."""
        hidden = self.mid_block(self.down_blocks[-1](hidden))
        return self.conv_out(self.conv_norm_out(hidden))


class Decoder(nn.Module):
    """Raw latents to pixels; doubles the size between blocks."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        groups = config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, has_attention=config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            UpBlock(
                widths[max(i - 1, 0)],
                width,
                num_layers=config.layers_per_block + 1,
                groups=groups,
                has_upsampler=i < len(widths) - 1,
            )
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=NORM_EPS, silu=True)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def expand(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, width, h, w): all up to the first change of size."""
        first, *_ = self._blocks()
        return first.refine(self.mid_block(self.conv_in(latents)))

    def upsample(self, hidden: Tensor) -> Tensor:
        """(B, width, h, w) -> (B, 3, H, W)."""
        first, *rest = self._blocks()
        hidden = first.enlarge(hidden)
        for block in rest:
            hidden = block.enlarge(block.refine(hidden))  # (B, width, 2h, 2w)
        return self.conv_out(self.conv_norm_out(hidden))

    def _blocks(self) -> "list[UpBlock]":
        return cast("list[UpBlock]", list(self.up_blocks))


class DownBlock(nn.Module):
    """Residual blocks, then half the size."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        num_layers: int,
        groups: int,
        has_downsampler: bool,
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, channels, num_layers, groups)
        self.downsamplers = nn.ModuleList([Downsample(channels)] if has_downsampler else [])

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            hidden = layer(hidden)
        return hidden


class UpBlock(nn.Module):
    """Residual blocks, then twice the size."""

    def __init__(
        self, in_channels: int, channels: int, *, num_layers: int, groups: int, has_upsampler: bool
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, channels, num_layers, groups)
        self.upsamplers = nn.ModuleList([Upsample(channels)] if has_upsampler else [])

    def refine(self, hidden: Tensor) -> Tensor:
        """(B, in, h, w) -> (B, channels, h, w)."""
        for resnet in self.resnets:
            hidden = resnet(hidden)
        return hidden

    def enlarge(self, hidden: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, channels, 2h, 2w), or the same in the last block."""
        for upsampler in self.upsamplers:
            hidden = upsampler(hidden)
        return hidden


def _resnets(in_channels: int, channels: int, num_layers: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(
        ResnetBlock(in_channels if i == 0 else channels, channels, groups)
        for i in range(num_layers)
    )


class MidBlock(nn.Module):
    """Residual block, attention over all positions, residual block."""

    def __init__(self, channels: int, groups: int, *, has_attention: bool) -> None:
        super().__init__()
        self.resnets = _resnets(channels, channels, 2, groups)
        self.attentions = nn.ModuleList([Attention(channels, groups)] if has_attention else [])

    def forward(self, hidden: Tensor) -> Tensor:
        first, last = self.resnets
        for layer in (first, *self.attentions, last):
            hidden = layer(hidden)
        return hidden


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); a 1x1 convolution of x where widths differ."""

    def __init__(self, in_channels: int, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps=NORM_EPS, silu=True)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, channels, eps=NORM_EPS, silu=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = (
            PointwiseConv(in_channels, channels) if in_channels != channels else None
        )
        self.conv1_bias: Tensor | None = None
        self.conv2_bias: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(self.norm1(x))
        hidden = self.conv2(self.norm2(hidden, self.conv1_bias))
        if self.conv_shortcut is not None:
            x = to_image(self.conv_shortcut(to_tokens(x)), x.shape[-2:])
        return add_maps(x, hidden, self.conv2_bias)

    @torch.no_grad()
    def fold_biases(self) -> None:
        """Take both convolutions' biases to where a later operation adds them for free.

        A convolution's bias is a pass of its own over the map in eager torch.
        """
        if self.conv1.bias is not None:
            self.conv1_bias, self.conv1.bias = self.conv1.bias, None
        if self.conv2.bias is not None:
            self.conv2_bias = take_bias(self.conv2, self.conv_shortcut)


class Attention(nn.Module):
    """Self-attention over all positions, one head as wide as the block: 512 in published models."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.to_qkv: nn.Linear | None = None

    def fuse_projections(self) -> None:
        """Replace to_q, to_k and to_v by one projection; a second call changes nothing."""
        if self.to_qkv is not None:
            return
        parts = (self.to_q, self.to_k, self.to_v)
        channels = self.to_q.in_features
        self.to_qkv = nn.Linear(channels, 3 * channels, device="meta")
        self.to_qkv.weight = nn.Parameter(torch.cat([part.weight for part in parts]), False)
        self.to_qkv.bias = nn.Parameter(torch.cat([part.bias for part in parts]), False)
        del self.to_q, self.to_k, self.to_v

    def forward(self, x: Tensor) -> Tensor:
        tokens = to_tokens(self.group_norm(x))  # (B, H * W, C)
        if self.to_qkv is not None:
            query, key, value = self.to_qkv(tokens).chunk(3, dim=-1)
        else:
            query, key, value = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        # CUDA's blockwise kernels take (B, heads, N, C) only, so the one head gets its axis.
        mixed = attend(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)).squeeze(1)
        return x + to_image(self.to_out[0](mixed), x.shape[-2:])


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, max_scores: int = MAX_ATTENTION_SCORES
) -> Tensor:
    """Attention of (B, heads, N, C), in slices of queries that bound memory whatever the backend.

    Flash and cuDNN kernels refuse a head 512 wide. CUDA's memory-efficient kernel takes it without
    an (N, N) matrix if the width is a multiple of 8; the fallback holds the matrix several times.
    """
    num_queries = max(1, max_scores // (key.shape[0] * key.shape[1] * key.shape[2]))
    if query.shape[2] <= num_queries:
        return F.scaled_dot_product_attention(query, key, value)
    slices = query.split(num_queries, dim=2)
    return torch.cat([F.scaled_dot_product_attention(part, key, value) for part in slices], dim=2)


class Downsample(nn.Module):
    """Stride 2, padded on the right and below only, as the original was trained."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Each position to 2x2 equal ones, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(enlarge_nearest(x, (2 * x.shape[2], 2 * x.shape[3])))
