"""The conditional UNet of Stable Diffusion 2.1, SDXL and the SDXL refiner.

Parameter names and shapes are those of the diffusers checkpoints (`unet/`). Timesteps, prompts
and sizes are per row; what does not change from step to step is computed once, as a UNetContext.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydiff.errors import ModelError
from raydiff.models.attention import CrossAttention, SelfAttention, SpatialTransformer
from raydiff.models.feature_map import use_channels_last
from raydiff.models.group_norm import GroupNorm
from raydiff.models.options import check_options, positive
from raydiff.models.resnet import Downsample, ResnetBlock, Upsample


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetConfig:
    """Shape of a UNet; tuples have one item for each resolution, highest first."""

    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    has_attention: tuple[bool, ...]
    num_heads: tuple[int, ...]
    transformer_layers: tuple[int, ...]
    """Transformer blocks after each resnet; the middle block has the last item's number."""
    layers_per_block: int
    cross_attention_dim: int
    use_linear_projection: bool
    norm_num_groups: int
    norm_eps: float
    addition_time_embed_dim: int | None
    """SDXL's text_time conditioning: sinusoid width of each of the `time_ids`; None without."""
    addition_embed_dim: int | None
    """Width of pooled text embedding and embedded time_ids together."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a diffusers `unet/config.json`; an option we do not run is a ModelError."""
        check_options("unet", config, known=(*_DEFAULTS, *_WITHOUT_EFFECT), accepted=_ACCEPTED)
        options = {**_DEFAULTS, **config}
        result = cls(
            in_channels=positive("unet", options, "in_channels"),
            out_channels=positive("unet", options, "out_channels"),
            block_out_channels=_per_level(options, "block_out_channels"),
            has_attention=_attention_levels(options),
            # Misnamed there: `attention_head_dim` is the number of heads.
            num_heads=_per_level(options, "attention_head_dim"),
            transformer_layers=_per_level(options, "transformer_layers_per_block"),
            layers_per_block=_same_everywhere(options, "layers_per_block"),
            cross_attention_dim=_same_everywhere(options, "cross_attention_dim"),
            use_linear_projection=options["use_linear_projection"],
            norm_num_groups=positive("unet", options, "norm_num_groups"),
            norm_eps=options["norm_eps"],
            addition_time_embed_dim=_text_time_width(options, "addition_time_embed_dim"),
            addition_embed_dim=_text_time_width(options, "projection_class_embeddings_input_dim"),
        )
        _check_divisible(result)
        return result


class UNetContext(NamedTuple):
    """What a batch's rows bring to every step: computed once, indexed as rows come and go."""

    keys_values: tuple[Tensor, ...]
    """Of each cross attention, in the order they run: (B, S, 2*C), keys then values."""
    added_embedding: Tensor | None
    """(B, time_dim), to be added to the time embedding; None without text_time conditioning."""

    def rows(self, index: Tensor) -> "UNetContext":
        """The context of the rows in `index` (int64, on the context's device), in that order."""
        added = self.added_embedding
        return UNetContext(
            keys_values=tuple(item.index_select(0, index) for item in self.keys_values),
            added_embedding=None if added is None else added.index_select(0, index),
        )


class UNet(nn.Module):
    """Predicts the noise (or v) in a batch of latents whose rows may be at different steps."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.is_channels_last = False
        channels = config.block_out_channels
        time_dim = 4 * channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = EmbeddingMLP(channels[0], time_dim)
        if config.addition_embed_dim is not None:
            self.add_embedding = EmbeddingMLP(config.addition_embed_dim, time_dim)

        skip_channels = [channels[0]]
        self.down_blocks = nn.ModuleList()
        for level in range(len(channels)):
            block = DownBlock(config, level, skip_channels[-1])
            self.down_blocks.append(block)
            skip_channels += [channels[level]] * (len(block.resnets) + len(block.downsamplers))
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList()
        width = channels[-1]
        for level in reversed(range(len(channels))):
            skips = [skip_channels.pop() for _ in range(config.layers_per_block + 1)]
            self.up_blocks.append(UpBlock(config, level, width, skips))
            width = channels[level]

        self.conv_norm_out = GroupNorm(
            config.norm_num_groups, channels[0], eps=config.norm_eps, silu=True
        )
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timesteps: Tensor,
        context: UNetContext | None = None,
        *,
        prompt_embeds: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """sample (B, in, h, w), timesteps (B,) float or int -> prediction (B, out, h, w).

        The prompt comes as a context, or as the arguments of `precompute_context`.
        """
        if context is None:
            if prompt_embeds is None:
                raise ValueError("UNet needs a context or prompt_embeds")
            context = self.precompute_context(prompt_embeds, text_embeds, time_ids)
        keys_values = iter(context.keys_values)
        time_activation = self._time_activation(timesteps, context.added_embedding)
        x = self.conv_in(self._as_stored(sample))  # (B, C, h, w)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, skips, time_activation, keys_values)
        x = self.mid_block(x, time_activation, keys_values)
        for block in self.up_blocks:
            x = block(x, skips, time_activation, keys_values)
        return self.conv_out(self.conv_norm_out(x))

    def precompute_context(
        self,
        prompt_embeds: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> UNetContext:
        """Everything that the prompt contributes: prompt_embeds (B, S, cross_attention_dim).

        text_time models also need text_embeds (B, P), the pooled prompt, and time_ids (B, 6), or
        (B, 5) for the refiner.
        """
        prompt_embeds = prompt_embeds.to(self.dtype)
        return UNetContext(
            keys_values=tuple(
                attention.keys_values(prompt_embeds) for attention in self.cross_attentions()
            ),
            added_embedding=self._added_embedding(text_embeds, time_ids),
        )

    def cross_attentions(self) -> Iterator[CrossAttention]:
        """The cross attentions in the order in which `forward` runs them."""
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            for transformer in block.attentions:
                for layer in transformer.transformer_blocks:
                    yield layer.attn2

    @torch.no_grad()
    def prepare_for_inference(self, channels_last: bool) -> None:
        """Fuse projections, fold biases and order memory, in place; the outputs stay the same.

        Call it after the weights are loaded: parameter names are no longer the checkpoint's.
        """
        self.is_channels_last = channels_last
        self.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, SelfAttention | CrossAttention):
                module.fuse_projections()
            elif isinstance(module, ResnetBlock):
                module.fold_biases()
        if channels_last:
            use_channels_last(self)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which the network computes."""
        return self.conv_in.weight.dtype

    def _as_stored(self, sample: Tensor) -> Tensor:
        layout = torch.channels_last if self.is_channels_last else torch.contiguous_format
        return sample.to(self.dtype).contiguous(memory_format=layout)

    def _time_activation(self, timesteps: Tensor, added: Tensor | None) -> Tensor:
        """silu(time embedding) (B, time_dim), the form in which every resnet takes it."""
        width = self.config.block_out_channels[0]
        embedding = self.time_embedding(sinusoidal_embedding(timesteps, width).to(self.dtype))
        return F.silu(embedding if added is None else embedding + added)

    def _added_embedding(
        self, text_embeds: Tensor | None, time_ids: Tensor | None
    ) -> Tensor | None:
        width = self.config.addition_time_embed_dim
        if width is None:
            return None
        if text_embeds is None or time_ids is None:
            raise ValueError("a UNet with text_time conditioning needs text_embeds and time_ids")
        times = sinusoidal_embedding(time_ids.flatten(), width)  # (B*6, width)
        times = times.unflatten(0, time_ids.shape).flatten(1).to(self.dtype)  # (B, 6*width)
        return self.add_embedding(torch.cat([text_embeds.to(self.dtype), times], dim=-1))


class DownBlock(nn.Module):
    """Resnets at one resolution, each followed by attention where the level has it, then a
    downsampler on all levels but the last."""

    def __init__(self, config: UNetConfig, level: int, in_channels: int) -> None:
        super().__init__()
        channels = config.block_out_channels[level]
        inputs = [in_channels] + [channels] * (config.layers_per_block - 1)
        self.resnets = nn.ModuleList(_resnet(config, width, channels) for width in inputs)
        self.attentions = _attentions(config, level, len(inputs))
        is_last = level == len(config.block_out_channels) - 1
        self.downsamplers = nn.ModuleList([] if is_last else [Downsample(channels)])

    def forward(
        self,
        x: Tensor,
        skips: list[Tensor],
        time_activation: Tensor,
        keys_values: Iterator[Tensor],
    ) -> Tensor:
        """Append every layer's output to `skips` and return the last."""
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, time_activation)
            if len(self.attentions) > 0:
                x = self.attentions[index](x, keys_values)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        return x


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels = config.block_out_channels[-1]
        level = len(config.block_out_channels) - 1
        self.resnets = nn.ModuleList(_resnet(config, channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([_attention(config, level)])

    def forward(self, x: Tensor, time_activation: Tensor, keys_values: Iterator[Tensor]) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.resnets[0](x, time_activation)
        x = self.attentions[0](x, keys_values)
        return self.resnets[1](x, time_activation)


class UpBlock(nn.Module):
    """Resnets at one resolution, each taking one skip and followed by attention where the level
    has it, then an upsampler on all levels but the highest."""

    def __init__(
        self, config: UNetConfig, level: int, in_channels: int, skip_channels: list[int]
    ) -> None:
        super().__init__()
        channels = config.block_out_channels[level]
        inputs = [in_channels] + [channels] * (len(skip_channels) - 1)
        self.resnets = nn.ModuleList(
            _resnet(config, width + skip, channels)
            for width, skip in zip(inputs, skip_channels, strict=True)
        )
        self.attentions = _attentions(config, level, len(inputs))
        self.upsamplers = nn.ModuleList([Upsample(channels)] if level > 0 else [])

    def forward(
        self,
        x: Tensor,
        skips: list[Tensor],
        time_activation: Tensor,
        keys_values: Iterator[Tensor],
    ) -> Tensor:
        """Take this level's outputs off the end of `skips`; the upsampler aims at the next."""
        for index, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), time_activation)
            if len(self.attentions) > 0:
                x = self.attentions[index](x, keys_values)
        for upsampler in self.upsamplers:
            x = upsampler(x, skips[-1].shape[-2:])
        return x


class EmbeddingMLP(nn.Module):
    """Two linear layers with SiLU between them."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, out_features)
        self.linear_2 = nn.Linear(out_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_features) -> (B, out_features)."""
        return self.linear_2(F.silu(self.linear_1(x)))


def sinusoidal_embedding(values: Tensor, width: int) -> Tensor:
    """(N,) -> (N, width) in fp32: cosines, then sines, of frequencies from 1 down to near 1e-4."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values[:, None].float() * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _resnet(config: UNetConfig, in_channels: int, out_channels: int) -> ResnetBlock:
    return ResnetBlock(
        in_channels,
        out_channels,
        4 * config.block_out_channels[0],
        num_groups=config.norm_num_groups,
        eps=config.norm_eps,
    )


def _attentions(config: UNetConfig, level: int, count: int) -> nn.ModuleList:
    if not config.has_attention[level]:
        return nn.ModuleList()
    return nn.ModuleList(_attention(config, level) for _ in range(count))


def _attention(config: UNetConfig, level: int) -> SpatialTransformer:
    return SpatialTransformer(
        config.block_out_channels[level],
        num_heads=config.num_heads[level],
        num_layers=config.transformer_layers[level],
        cross_attention_dim=config.cross_attention_dim,
        num_groups=config.norm_num_groups,
        use_linear_projection=config.use_linear_projection,
    )


_DEFAULTS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "attention_head_dim": 8,
    "transformer_layers_per_block": 1,
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "use_linear_projection": False,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
}
"""What a config that leaves an option out means by it (diffusers' defaults)."""

_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
"""Options of which we run only these values."""

_WITHOUT_EFFECT = ("sample_size", "dropout", "upcast_attention", "addition_embed_type_num_heads")
"""Not used in inference, or not by text_time; attention is always softmaxed in fp32."""


def _attention_levels(options: Mapping[str, Any]) -> tuple[bool, ...]:
    types = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    has_attention = []
    for name in options["down_block_types"]:
        if name not in types:
            raise ModelError(
                f"unet config: down_block_types has {name!r}; only {' and '.join(types)} can be run"
            )
        has_attention.append(types[name])
    mirrored = [
        "CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(has_attention)
    ]
    if list(options["up_block_types"]) != mirrored:
        raise ModelError(
            f"unet config: up_block_types is {list(options['up_block_types'])}; it must mirror "
            f"down_block_types: {mirrored}"
        )
    return tuple(has_attention)


def _per_level(options: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """The option's value at each level, whether it was given as one number or as a list."""
    levels = len(options["block_out_channels"])
    value = options[name]
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * levels
    if len(values) != levels or not all(isinstance(item, int) and item > 0 for item in values):
        raise ModelError(
            f"unet config: {name} is {value!r}; expected a positive integer, or one for each of "
            f"the {levels} block_out_channels"
        )
    return values


def _same_everywhere(options: Mapping[str, Any], name: str) -> int:
    values = _per_level(options, name)
    if len(set(values)) > 1:
        raise ModelError(
            f"unet config: {name} is {options[name]!r}; only one value for all levels can be run"
        )
    return values[0]


def _text_time_width(options: Mapping[str, Any], name: str) -> int | None:
    if options["addition_embed_type"] is None:
        return None
    if not isinstance(options[name], int):
        raise ModelError(
            f"unet config: {name} is {options[name]!r}; addition_embed_type text_time needs a width"
        )
    return options[name]


def _check_divisible(config: UNetConfig) -> None:
    """Heads and norm groups must share a level's channels out evenly."""
    for level, channels in enumerate(config.block_out_channels):
        parts = {"norm_num_groups": config.norm_num_groups}
        if config.has_attention[level] or level == len(config.block_out_channels) - 1:
            parts["attention_head_dim (number of heads)"] = config.num_heads[level]
        for name, number in parts.items():
            if channels % number:
                raise ModelError(
                    f"unet config: {name} is {number}; it must divide block_out_channels {channels}"
                )
