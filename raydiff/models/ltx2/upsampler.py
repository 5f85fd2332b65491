"""LTX-2's latent upsampler: raw latents of the video VAE to twice the height and width, or to twice
the frames. Inference only; parameter names are the diffusers checkpoint's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydiff.errors import ModelError, nearest
from raydiff.models.group_norm import GroupNorm
from raydiff.models.ltx2.video_layers import unfold
from raydiff.models.ltx2.video_vae_config import Factors

NUM_GROUPS = 32
NORM_EPS = 1e-5

_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("LTX2LatentUpsamplerModel",),
    "dims": (3,),
    "rational_spatial_scale": (2.0,),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LTX2UpsamplerConfig:
    """Shape of the upsampler; names are diffusers' own and defaults those of LTX-2.0's x2."""

    in_channels: int = 128
    mid_channels: int = 1024
    num_blocks_per_stage: int = 4
    spatial_upsample: bool = True
    temporal_upsample: bool = False
    use_rational_resampler: bool = True
    """LTX-2.0's layout of the spatial upsampler: it also stores a blur that x2 does not apply."""

    def __post_init__(self) -> None:
        if not (self.spatial_upsample or self.temporal_upsample):
            raise ModelError(
                "upsampler config: spatial_upsample and temporal_upsample are false; at least one "
                "must be true. Check latent_upsampler/config.json."
            )
        if self.mid_channels % NUM_GROUPS:
            raise ModelError(
                f"upsampler config: mid_channels is {self.mid_channels}; it must be a multiple of "
                f"{NUM_GROUPS}. Check latent_upsampler/config.json."
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read diffusers' `latent_upsampler/config.json`.

        Raises ModelError for another scale than 2 and for unknown options.
        """
        names = [field.name for field in fields(cls)]
        for name, value in config.items():
            if name in _SUPPORTED and value not in (None, *_SUPPORTED[name]):
                raise ModelError(
                    f"upsampler config: {name} is {value}; only {_SUPPORTED[name][0]} is "
                    "supported. Use an LTX-2 x2 upsampler."
                )
            is_known = name.startswith("_") or name in (*names, *_SUPPORTED)
            if not is_known and value not in (None, False):
                raise ModelError(
                    f"upsampler config: {name} is {value}; raydiff does not know this option. "
                    f"{nearest(name, names)}Use an LTX-2 x2 upsampler."
                )
        return cls(**{name: config[name] for name in names if config.get(name) is not None})

    @property
    def factors(self) -> Factors:
        """By how much frames, rows and columns multiply."""
        side = 2 if self.spatial_upsample else 1
        return 2 if self.temporal_upsample else 1, side, side


class LTX2Upsampler(nn.Module):
    """Raw latents (B, C, F, h, w), see `LTX2VideoVAE.denormalize`, to raw latents of the new size.

    The spatial kind gives (B, C, F, 2h, 2w), the temporal kind (B, C, 2F - 1, h, w).
    """

    def __init__(self, config: LTX2UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.mid_channels
        self.initial_conv = nn.Conv3d(config.in_channels, width, 3, padding=1)
        self.initial_norm = GroupNorm(NUM_GROUPS, width, eps=NORM_EPS, silu=True)
        self.res_blocks, self.post_upsample_res_blocks = (
            nn.ModuleList(ResnetBlock(width) for _ in range(config.num_blocks_per_stage))
            for _ in range(2)
        )
        self.upsampler = _resampler(config)
        self.final_conv = nn.Conv3d(width, config.in_channels, 3, padding=1)
        self.requires_grad_(False)

    def forward(self, latents: Tensor) -> Tensor:
        hidden = self.initial_conv(latents.to(self.initial_conv.weight.dtype))
        hidden = _normalize(self.initial_norm, hidden)
        for block in self.res_blocks:
            hidden = block(hidden)
        hidden = self._enlarge(hidden)
        for block in self.post_upsample_res_blocks:
            hidden = block(hidden)
        return self.final_conv(hidden)

    def _enlarge(self, hidden: Tensor) -> Tensor:
        resampler = self.upsampler
        conv = resampler.conv if isinstance(resampler, RationalResampler) else resampler[0]
        if isinstance(conv, nn.Conv2d):
            # Frame by frame: as a kernel one frame deep it needs no other order of the axes.
            hidden = F.conv3d(hidden, conv.weight.unsqueeze(2), conv.bias, padding=(0, 1, 1))
        else:
            hidden = conv(hidden)
        hidden = unfold(hidden, self.config.factors)
        # The first latent frame stands for one frame of pixels: it must not become two.
        return hidden[:, :, self.config.factors[0] - 1 :]

    def prepare_for_inference(self) -> None:
        """Order the weights as CUDA's tensor-core convolutions read them, in place."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                module.weight.data = module.weight.data.contiguous(
                    memory_format=torch.channels_last_3d
                )


class ResnetBlock(nn.Module):
    """silu(x + norm(conv(silu(norm(conv(x))))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.norm1 = GroupNorm(NUM_GROUPS, channels, eps=NORM_EPS, silu=True)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)
        self.norm2 = GroupNorm(NUM_GROUPS, channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        hidden = _normalize(self.norm1, self.conv1(x))
        hidden = _normalize(self.norm2, self.conv2(hidden))
        return F.silu(hidden.add_(x), inplace=True)


def _normalize(norm: GroupNorm, clip: Tensor) -> Tensor:
    """Statistics of the whole clip: rows and columns as one axis, since `norm` takes two."""
    return norm(clip.flatten(3)).unflatten(3, clip.shape[3:])


class RationalResampler(nn.Module):
    """The names of LTX-2.0's spatial upsampler. Its scale is 2 / 1, so nothing is blurred."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)
        self.blur_down = nn.Module()
        self.blur_down.register_buffer("kernel", torch.empty(1, 1, 5, 5))


def _resampler(config: LTX2UpsamplerConfig) -> "RationalResampler | nn.ModuleList":
    width = config.mid_channels
    if config.temporal_upsample:
        return nn.ModuleList([nn.Conv3d(width, prod(config.factors) * width, 3, padding=1)])
    if config.use_rational_resampler:
        return RationalResampler(width)
    return nn.ModuleList([nn.Conv2d(width, 4 * width, 3, padding=1)])
