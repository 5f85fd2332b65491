"""LTX-2's video autoencoder: clips of 8 n + 1 frames <-> raw latents, and raw latents <-> the
normalised ones that diffusion works on. Inference only; parameter names are the diffusers
checkpoint's. Source: LTX-2 (arXiv 2601.03233); 2.0 and 2.3 differ in their config alone.
"""

from collections.abc import Iterator
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from raydiff.errors import RowError
from raydiff.models.autoencoder_kl import Moments
from raydiff.models.ltx2.video_layers import (
    Carry,
    ClipConv,
    ConvFactory,
    Downsample,
    ResnetBlock,
    Stage,
    Upsample,
    fold,
    normalize_silu,
    run_in_chunks,
    run_whole,
    unfold,
)
from raydiff.models.ltx2.video_vae_config import BlockShape, LTX2VideoVAEConfig


class LTX2VideoVAE(nn.Module):
    """Pixels (B, 3, 8 n + 1, H, W) in -1..1 to raw latents (B, C, n + 1, H / 32, W / 32) and back.

    Both ways can run in chunks of frames, with the same result in less memory.
    """

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, config: LTX2VideoVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.register_buffer("latents_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latents_std", torch.ones(config.latent_channels))
        self.requires_grad_(False)

    def encode(self, pixels: Tensor) -> Moments:
        """Return the posterior of `pixels`; its mean is what image conditioning takes."""
        return _moments(run_whole(self.encoder.stages, pixels.to(self.dtype)))

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels, about -1..1 but not clamped, of raw `latents` (see `denormalize`)."""
        self._check_size(latents)
        return run_whole(self.decoder.stages, latents.to(self.dtype))

    def encode_in_chunks(self, pixels: Tensor, num_frames: int) -> Iterator[Moments]:
        """Yield the parts of `encode` in order, reading `num_frames` frames, a multiple of 8, each.

        The first chunk has one frame more.
        """
        first = pixels[:, :, : num_frames + 1]
        rest = pixels[:, :, num_frames + 1 :].split(num_frames, dim=2)
        chunks = (chunk.to(self.dtype) for chunk in (first, *rest))
        return map(_moments, run_in_chunks(self.encoder.stages, chunks))

    def decode_in_chunks(self, latents: Tensor, num_frames: int) -> Iterator[Tensor]:
        """Yield the frames of `decode` in order, working on `num_frames`, a multiple of 8, each.

        Parts come in sizes up to that or 16: layers wait for frames that follow, and then catch up.
        """
        self._check_size(latents)
        chunks = latents.to(self.dtype).split(num_frames // self.config.temporal_downscale, dim=2)
        return run_in_chunks(self.decoder.stages, chunks)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which the network computes."""
        return self.decoder.conv_in.conv.weight.dtype

    def normalize(self, raw: Tensor) -> Tensor:
        """Turn the encoder's latents (B, C, F, h, w) into those that diffusion works on."""
        mean, std = self._statistics(raw)
        return (raw - mean) * self.config.scaling_factor / std

    def denormalize(self, latents: Tensor) -> Tensor:
        """Undo `normalize`."""
        mean, std = self._statistics(latents)
        return latents * std / self.config.scaling_factor + mean

    def prepare_for_inference(self) -> None:
        """Order the weights as CUDA's tensor-core convolutions read them, in place."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                module.weight.data = module.weight.data.contiguous(
                    memory_format=torch.channels_last_3d
                )

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (
            values.to(latents.device, latents.dtype)[:, None, None, None]
            for values in (self.latents_mean, self.latents_std)
        )
        return mean, std

    def _check_size(self, latents: Tensor) -> None:
        height, width = latents.shape[3:]
        if self.config.decoder_spatial_padding_mode == "reflect" and min(height, width) < 2:
            scale = self.config.spatial_downscale
            raise RowError(
                f"the video is {height * scale} pixels high and {width * scale} wide; this "
                f"checkpoint mirrors the edges and needs {2 * scale} at least. "
                f"Use a height and width of {2 * scale} or more."
            )


class Encoder(nn.Module):
    """Pixels to the mean of every latent channel and one log variance for all of them."""

    def __init__(self, config: LTX2VideoVAEConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        conv = partial(ClipConv, is_causal=True, padding_mode=config.encoder_spatial_padding_mode)
        width = config.block_out_channels[-1]
        self.conv_in = conv(config.in_channels * config.patch_size**2, config.latent_channels)
        self.down_blocks = nn.ModuleList(DownBlock(shape, conv) for shape in config.encoder_blocks)
        self.mid_block = MidBlock(width, config.layers_per_block[-1], conv)
        self.conv_out = conv(width, config.latent_channels + 1)

    @property
    def stages(self) -> list[Stage]:
        """The network in steps that `run_whole` or `run_in_chunks` takes."""
        blocks = [layer for block in self.down_blocks for layer in cast(DownBlock, block).layers]
        return [self._expand, *blocks, *self.mid_block.resnets, self._compress]

    def _expand(self, pixels: Tensor, carry: Carry) -> Tensor:
        return self.conv_in(patchify(pixels, self.patch_size), carry)

    def _compress(self, hidden: Tensor, carry: Carry) -> Tensor:
        return self.conv_out(normalize_silu(hidden), carry)


class Decoder(nn.Module):
    """Raw latents to pixels."""

    def __init__(self, config: LTX2VideoVAEConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        conv = partial(
            ClipConv,
            is_causal=config.decoder_causal,
            padding_mode=config.decoder_spatial_padding_mode,
        )
        shapes = config.decoder_blocks
        width = shapes[0].in_channels
        self.conv_in = conv(config.latent_channels, width)
        self.mid_block = MidBlock(width, config.decoder_layers_per_block[-1], conv)
        self.up_blocks = nn.ModuleList(UpBlock(shape, conv) for shape in shapes)
        self.conv_out = conv(shapes[-1].channels, config.out_channels * config.patch_size**2)

    @property
    def stages(self) -> list[Stage]:
        """The network in steps that `run_whole` or `run_in_chunks` takes."""
        blocks = [layer for block in self.up_blocks for layer in cast(UpBlock, block).layers]
        return [self.conv_in, *self.mid_block.resnets, *blocks, self._to_pixels]

    def _to_pixels(self, hidden: Tensor, carry: Carry) -> Tensor:
        return unpatchify(self.conv_out(normalize_silu(hidden), carry), self.patch_size)


class DownBlock(nn.Module):
    """Residual blocks, then a smaller size."""

    def __init__(self, shape: BlockShape, conv: ConvFactory) -> None:
        super().__init__()
        self.resnets = _resnets(shape.in_channels, shape.num_layers, conv)
        self.downsamplers = nn.ModuleList(
            [Downsample(shape.in_channels, shape.channels, shape.factors, conv)]
        )

    @property
    def layers(self) -> list[nn.Module]:
        """In order of execution."""
        return [*self.resnets, *self.downsamplers]


class UpBlock(nn.Module):
    """A larger size, then residual blocks."""

    def __init__(self, shape: BlockShape, conv: ConvFactory) -> None:
        super().__init__()
        self.upsamplers = nn.ModuleList(
            [
                Upsample(
                    shape.in_channels,
                    shape.channels,
                    shape.factors,
                    conv,
                    has_residual=shape.has_residual,
                )
            ]
        )
        self.resnets = _resnets(shape.channels, shape.num_layers, conv)

    @property
    def layers(self) -> list[nn.Module]:
        """In order of execution."""
        return [*self.upsamplers, *self.resnets]


class MidBlock(nn.Module):
    """Residual blocks at the latents' size."""

    def __init__(self, channels: int, num_layers: int, conv: ConvFactory) -> None:
        super().__init__()
        self.resnets = _resnets(channels, num_layers, conv)


def _resnets(channels: int, num_layers: int, conv: ConvFactory) -> nn.ModuleList:
    return nn.ModuleList(ResnetBlock(channels, conv) for _ in range(num_layers))


def _moments(hidden: Tensor) -> Moments:
    """(B, C + 1, F, h, w) to the posterior, whose channels share one log variance."""
    mean = hidden[:, :-1]
    return Moments(mean, hidden[:, -1:].clamp(-30.0, 20.0).expand_as(mean))


def patchify(pixels: Tensor, size: int) -> Tensor:
    """(B, C, F, H, W) -> (B, C * w * h, F, H / h, W / w): columns before rows in the channels."""
    return fold(pixels.transpose(3, 4), (1, size, size)).transpose(3, 4)


def unpatchify(patches: Tensor, size: int) -> Tensor:
    """Undo `patchify`."""
    return unfold(patches.transpose(3, 4), (1, size, size)).transpose(3, 4)
