"""Shape of an LTX-2 video autoencoder, as diffusers' `vae/config.json` tells it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Any, Literal, NamedTuple, Self

from raydiff.errors import ModelError, nearest

Factors = tuple[int, int, int]
"""By how much a change of size multiplies or divides frames, rows and columns."""

Resize = Literal["spatial", "temporal", "spatiotemporal"]

PaddingMode = Literal["zeros", "reflect"]

FACTORS: dict[str, Factors] = {
    "spatial": (1, 2, 2),
    "temporal": (2, 1, 1),
    "spatiotemporal": (2, 2, 2),
}

_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("AutoencoderKLLTX2Video",),
    "patch_size_t": (1,),
    "encoder_causal": (True,),
    "timestep_conditioning": (False,),
    "down_block_types": ("LTX2VideoDownBlock3D",),
    "spatio_temporal_scaling": (True,),
    "decoder_spatio_temporal_scaling": (True,),
    "decoder_inject_noise": (False,),
    "downsample_type": tuple(FACTORS),
    "upsample_type": tuple(FACTORS),
    "encoder_spatial_padding_mode": ("zeros", "reflect"),
    "decoder_spatial_padding_mode": ("zeros", "reflect"),
}
"""What an option, or each member of a list, may be: what the published checkpoints have."""

_RATIOS = ("spatial_compression_ratio", "temporal_compression_ratio")
"""They follow from the blocks, and are compared with them."""

_UNUSED = ("resnet_norm_eps",)
"""Of a norm between blocks of unequal width, which no checkpoint has."""


class BlockShape(NamedTuple):
    """Residual blocks and a change of size, which comes first in the decoder and last in the
    encoder: `num_layers` residual blocks are `in_channels` wide there and `channels` wide here.
    """

    in_channels: int
    channels: int
    factors: Factors
    num_layers: int
    has_residual: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class LTX2VideoVAEConfig:
    """Shape of the autoencoder; names are diffusers' own and defaults those of LTX-2.0.

    Lists of the decoder go from pixels to latents, against the order of execution, except
    `upsample_type`.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 128
    patch_size: int = 4
    block_out_channels: tuple[int, ...] = (256, 512, 1024, 2048)
    layers_per_block: tuple[int, ...] = (4, 6, 6, 2, 2)
    downsample_type: tuple[Resize, ...] = (
        "spatial",
        "temporal",
        "spatiotemporal",
        "spatiotemporal",
    )
    encoder_spatial_padding_mode: PaddingMode = "zeros"
    decoder_block_out_channels: tuple[int, ...] = (256, 512, 1024)
    decoder_layers_per_block: tuple[int, ...] = (5, 5, 5, 5)
    upsample_type: tuple[Resize, ...] = ("spatiotemporal", "spatiotemporal", "spatiotemporal")
    upsample_factor: tuple[int, ...] = (2, 2, 2)
    """By how much a change of size divides the channels."""
    upsample_residual: tuple[bool, ...] = (True, True, True)
    decoder_spatial_padding_mode: PaddingMode = "reflect"
    decoder_causal: bool = False
    scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        self._check_lengths("block_out_channels", "layers_per_block", "downsample_type")
        self._check_lengths(
            "decoder_block_out_channels",
            "decoder_layers_per_block",
            "upsample_type",
            "upsample_factor",
            "upsample_residual",
        )
        self._check_encoder_widths()
        self._check_decoder_widths()
        if _downscale(self.upsample_type) != _downscale(self.downsample_type):
            raise ModelError(
                f"video vae config: upsample_type is {', '.join(self.upsample_type)} and "
                f"downsample_type {', '.join(self.downsample_type)}; the decoder must undo what "
                "the encoder does to the size. Check vae/config.json."
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read diffusers' `vae/config.json`.

        Raises ModelError for options that no published checkpoint uses, and for unknown ones.
        """
        names = [field.name for field in fields(cls)]
        for name, value in config.items():
            _check_option(name, value, names)
        values: dict[str, Any] = {
            name: tuple(config[name]) if isinstance(config[name], list) else config[name]
            for name in names
            if config.get(name) is not None
        }
        if isinstance(values.get("upsample_residual"), bool):
            num_blocks = len(values.get("decoder_block_out_channels", (256, 512, 1024)))
            values["upsample_residual"] = (values["upsample_residual"],) * num_blocks
        result = cls(**values)
        for name, ratio in zip(
            _RATIOS, (result.spatial_downscale, result.temporal_downscale), strict=True
        ):
            if config.get(name) not in (None, ratio):
                raise ModelError(
                    f"video vae config: {name} is {config[name]}; the blocks make it {ratio}. "
                    "Check vae/config.json."
                )
        return result

    @property
    def spatial_downscale(self) -> int:
        """Pixels along one side of a latent: 32 in all published checkpoints."""
        return self.patch_size * _downscale(self.downsample_type)[1]

    @property
    def temporal_downscale(self) -> int:
        """Frames of a latent frame, 8, except the clip's first, which is one frame."""
        return _downscale(self.downsample_type)[0]

    @property
    def encoder_blocks(self) -> list[BlockShape]:
        """The encoder's blocks in order of execution."""
        widths = (self.latent_channels, *self.block_out_channels)
        return [
            BlockShape(in_channels, channels, FACTORS[resize], num_layers, has_residual=True)
            for in_channels, channels, resize, num_layers in zip(
                widths[:-1],
                widths[1:],
                self.downsample_type,
                self.layers_per_block[:-1],
                strict=True,
            )
        ]

    @property
    def decoder_blocks(self) -> list[BlockShape]:
        """The decoder's blocks in order of execution."""
        return [
            BlockShape(width, width // divisor, FACTORS[resize], num_layers, has_residual)
            for width, divisor, resize, num_layers, has_residual in zip(
                self.decoder_block_out_channels[::-1],
                self.upsample_factor[::-1],
                self.upsample_type,
                self.decoder_layers_per_block[-2::-1],
                self.upsample_residual[::-1],
                strict=True,
            )
        ]

    def _check_lengths(self, blocks: str, layers: str, *others: str) -> None:
        num_blocks = len(getattr(self, blocks))
        expected = {layers: num_blocks + 1} | dict.fromkeys(others, num_blocks)
        for name, length in expected.items():
            if len(getattr(self, name)) != length:
                raise ModelError(
                    f"video vae config: {name} has {len(getattr(self, name))} values where "
                    f"{blocks} has {num_blocks}; it needs {length}. Check vae/config.json."
                )

    def _check_encoder_widths(self) -> None:
        for block in self.encoder_blocks:
            num_folded = prod(block.factors)
            if block.channels % num_folded or block.in_channels * num_folded % block.channels:
                raise ModelError(
                    f"video vae config: block_out_channels has {block.channels} after "
                    f"{block.in_channels}; it must be a multiple of {num_folded} that divides "
                    f"{block.in_channels * num_folded}. Check vae/config.json."
                )

    def _check_decoder_widths(self) -> None:
        width = self.decoder_block_out_channels[-1]
        for block in self.decoder_blocks:
            if block.in_channels != width:
                raise ModelError(
                    f"video vae config: decoder_block_out_channels has {block.in_channels} where "
                    f"the block before leaves {width}; blocks of unequal width are not supported. "
                    "Use an LTX-2 autoencoder."
                )
            width = block.channels
            num_unfolded = prod(block.factors)
            residual, remainder = divmod(block.in_channels, num_unfolded)
            if block.has_residual and (remainder or width % residual):
                raise ModelError(
                    f"video vae config: upsample_residual is set for a block of "
                    f"{block.in_channels} channels that become {width}; it needs a multiple of "
                    f"{num_unfolded}, and upsample_factor must divide {num_unfolded}. "
                    "Check vae/config.json."
                )


def _downscale(resizes: Sequence[Resize]) -> tuple[int, int]:
    """By how much the changes of size divide frames and sides."""
    factors = [FACTORS[resize] for resize in resizes]
    return prod(factor[0] for factor in factors), prod(factor[1] for factor in factors)


def _check_option(name: str, value: Any, known: Sequence[str]) -> None:
    values = value if isinstance(value, list | tuple) else (value,)
    for member in values:
        if name in _SUPPORTED and member is not None and member not in _SUPPORTED[name]:
            supported = " or ".join(map(str, _SUPPORTED[name]))
            raise ModelError(
                f"video vae config: {name} has {member}; only {supported} is supported. "
                "Use an LTX-2 autoencoder."
            )
    is_known = name.startswith("_") or name in (*known, *_SUPPORTED, *_RATIOS, *_UNUSED)
    if not is_known and value not in (None, False):
        raise ModelError(
            f"video vae config: {name} is {value}; raydiff does not know this option. "
            f"{nearest(name, known)}Use an LTX-2 autoencoder that this version supports."
        )
