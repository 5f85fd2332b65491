"""The audio-video transformer of LTX-2.0, 2.3 and 2.5.

Parameter names and shapes are those of the diffusers checkpoints (`transformer/`). Sigmas, texts,
frame rates and guidance variants are per row; what does not change from step to step is computed
once, as an LTX2Context.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydiff.models.fp8_linear import multiplies_fp8
from raydiff.models.ltx2.adaln import AdaLayerNormSingle, layer_values, modulate
from raydiff.models.ltx2.attention import SelfAttention, SourceAttention
from raydiff.models.ltx2.rope import LatentSize, Rotations, rotations
from raydiff.models.ltx2.transformer_block import (
    AcrossStep,
    BlockStep,
    StreamStep,
    TextKeysValues,
    TransformerBlock,
    num_modulation_values,
)
from raydiff.models.ltx2.transformer_config import LTX2TransformerConfig

MAX_COMPILED = 64
"""Variants of a block that are compiled (sizes, with and without guidance's passes); those of a run
are fewer, and past this number further ones would run uncompiled."""


class LTX2Context(NamedTuple):
    """What a batch's rows bring to every step: computed once, indexed as rows come and go."""

    rotations: Rotations
    video_text: Tensor
    """(T, S, dim): the distinct texts, in the video stream's width."""
    audio_text: Tensor
    """(T, S, audio_dim)."""
    text_rows: Tensor | None
    """(B,) int64: which text each row has; None where row i has text i."""
    keys_values: tuple[TextKeysValues, ...]
    """Of each block; empty where they depend on the step or were not to be kept."""

    def rows(self, index: Tensor) -> "LTX2Context":
        """The context of the rows in `index` (int64, on the context's device), in that order.

        Texts are pointed to, not copied: the passes of one request share one.
        """
        text_rows = self.text_rows
        return self._replace(
            rotations=self.rotations.rows(index),
            text_rows=index if text_rows is None else text_rows.index_select(0, index),
        )


class LTX2Velocity(NamedTuple):
    """What the transformer predicts: noise minus clean latents, per token."""

    video: Tensor
    """(B, N, out_channels)."""
    audio: Tensor
    """(B, M, audio_out_channels)."""


class LTX2OpenStep(NamedTuple):
    """A step between its first and last layers, as the blocks pass it on."""

    video: Tensor
    """(B, N, dim)."""
    audio: Tensor
    """(B, M, audio_dim)."""
    block_step: BlockStep
    video_embedded: Tensor
    """(B, G, dim): the embedded noise levels, which the last layer takes too."""
    audio_embedded: Tensor


class LTX2Transformer(nn.Module):
    """Predicts the velocity of video and audio latents in a batch of rows at different steps.

    `forward` is `open_step`, every one of `transformer_blocks` in order, then `close_step`: whoever
    brings the blocks to the device one by one calls the three parts.
    """

    def __init__(self, config: LTX2TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim, audio_dim = config.dim, config.audio_dim
        self.proj_in = nn.Linear(config.in_channels, dim)
        self.audio_proj_in = nn.Linear(config.audio_in_channels, audio_dim)
        if config.has_keyframe_embedding:
            self.keyframes_abs_pos_embedding = nn.Parameter(torch.zeros(1, dim))
        if config.caption_channels is not None:
            self.caption_projection = CaptionProjection(config.caption_channels, dim)
            self.audio_caption_projection = CaptionProjection(config.caption_channels, audio_dim)

        num_values = num_modulation_values(config)
        self.time_embed = AdaLayerNormSingle(dim, num_values)
        self.audio_time_embed = AdaLayerNormSingle(audio_dim, num_values)
        self.av_cross_attn_video_scale_shift = AdaLayerNormSingle(dim, 4)
        self.av_cross_attn_audio_scale_shift = AdaLayerNormSingle(audio_dim, 4)
        self.av_cross_attn_video_a2v_gate = AdaLayerNormSingle(dim, 1)
        self.av_cross_attn_audio_v2a_gate = AdaLayerNormSingle(audio_dim, 1)
        if config.has_step_dependent_text:
            self.prompt_adaln = AdaLayerNormSingle(dim, 2)
            self.audio_prompt_adaln = AdaLayerNormSingle(audio_dim, 2)

        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(config) for _ in range(config.num_layers)
        )
        self.scale_shift_table = nn.Parameter(torch.zeros(2, dim))
        self.audio_scale_shift_table = nn.Parameter(torch.zeros(2, audio_dim))
        self.proj_out = nn.Linear(dim, config.out_channels)
        self.audio_proj_out = nn.Linear(audio_dim, config.audio_out_channels)

    def keys_values_bytes(self, num_texts: int, num_tokens: int) -> int:
        """Return what `precompute_context` keeps where it keeps keys and values."""
        if self.config.has_step_dependent_text:
            return 0
        width = 2 * (self.config.dim + self.config.audio_dim)
        return num_texts * num_tokens * width * self.config.num_layers * self.dtype.itemsize

    def forward(
        self,
        video: Tensor,
        audio: Tensor,
        context: LTX2Context,
        *,
        sigmas: Tensor,
        video_sigmas: Tensor | None = None,
        audio_sigmas: Tensor | None = None,
        use_cross_timestep: bool = True,
        keyframe_tokens: Tensor | None = None,
        connected_rows: Tensor | None = None,
        perturbed: Mapping[int, Tensor] | None = None,
    ) -> LTX2Velocity:
        """video (B, N, in_channels) and audio (B, M, audio_in_channels) -> their velocities.

        The arguments up to `connected_rows` are those of `open_step`. `perturbed` has, for the
        numbers of some blocks, (B,) bool: the rows whose self attentions that block leaves out.
        """
        step = self.open_step(
            video,
            audio,
            context,
            sigmas=sigmas,
            video_sigmas=video_sigmas,
            audio_sigmas=audio_sigmas,
            use_cross_timestep=use_cross_timestep,
            keyframe_tokens=keyframe_tokens,
            connected_rows=connected_rows,
        )
        video, audio = step.video, step.audio
        for number, block in enumerate(self.transformer_blocks):
            video, audio = block(
                video,
                audio,
                step.block_step,
                context.keys_values[number] if context.keys_values else None,
                None if perturbed is None else perturbed.get(number),
            )
        return self.close_step(step._replace(video=video, audio=audio))

    def precompute_context(
        self,
        video_embeds: Tensor,
        audio_embeds: Tensor,
        *,
        latent_size: LatentSize,
        num_audio_tokens: int,
        frame_rates: Sequence[float],
        keeps_keys_values: bool = False,
    ) -> LTX2Context:
        """Everything that texts and positions contribute, for T rows.

        video_embeds and audio_embeds (T, S, caption_channels), or (T, S, dim) and
        (T, S, audio_dim) where the config has none: the connectors' outputs, every token of which
        counts. `frame_rates` has T pixel frames per second. `keeps_keys_values` saves 2 % of a
        step's work for `keys_values_bytes` (1.2 GB per text in bf16); it does nothing where they
        depend on the step.
        """
        if len(frame_rates) != video_embeds.shape[0]:
            raise ValueError(
                f"frame_rates has {len(frame_rates)} items and video_embeds "
                f"{video_embeds.shape[0]} rows; they must be as many"
            )
        video_text, audio_text = video_embeds.to(self.dtype), audio_embeds.to(self.dtype)
        if self.config.caption_channels is not None:
            video_text = self.caption_projection(video_text)
            audio_text = self.audio_caption_projection(audio_text)
        keys_values: list[TextKeysValues] = []
        if keeps_keys_values and not self.config.has_step_dependent_text:
            for block in self.transformer_blocks:
                layer = cast(TransformerBlock, block)
                keys_values.append(layer.text_keys_values(video_text, audio_text))
        return LTX2Context(
            rotations=rotations(
                self.config, latent_size, num_audio_tokens, frame_rates, video_text.device
            ),
            video_text=video_text,
            audio_text=audio_text,
            text_rows=None,
            keys_values=tuple(keys_values),
        )

    def open_step(
        self,
        video: Tensor,
        audio: Tensor,
        context: LTX2Context,
        *,
        sigmas: Tensor,
        video_sigmas: Tensor | None = None,
        audio_sigmas: Tensor | None = None,
        use_cross_timestep: bool = True,
        keyframe_tokens: Tensor | None = None,
        connected_rows: Tensor | None = None,
    ) -> LTX2OpenStep:
        """Everything before the blocks.

        `sigmas` (B,) are the rows' noise levels, 0 to 1. Tokens that stand elsewhere (a given first
        frame is clean) say so in `video_sigmas` (B, G) or `audio_sigmas` (B, G): each of the G for
        N / G tokens in a row, so per token where G is N, per latent frame where G is their number.
        The streams' attentions to each other see the other's row sigma, or, without
        `use_cross_timestep`, the tokens' own (LTX-2.0 as first released). `keyframe_tokens` (B, N)
        marks the tokens that get the keyframe embedding. `connected_rows` (K,) int64, in any order,
        are the rows whose streams attend to each other: all by default, none if empty.
        """
        scale = self.config.timestep_scale_multiplier
        row_times = sigmas.float()[:, None] * scale  # (B, 1)
        video_times = row_times if video_sigmas is None else video_sigmas.float() * scale
        audio_times = row_times if audio_sigmas is None else audio_sigmas.float() * scale
        video_modulation, video_embedded = self.time_embed(video_times)
        audio_modulation, audio_embedded = self.audio_time_embed(audio_times)
        has_text_step = self.config.has_step_dependent_text
        block_step = BlockStep(
            video=StreamStep(
                video_modulation,
                context.video_text,
                self.prompt_adaln(row_times)[0] if has_text_step else None,
                context.rotations.video,
            ),
            audio=StreamStep(
                audio_modulation,
                context.audio_text,
                self.audio_prompt_adaln(row_times)[0] if has_text_step else None,
                context.rotations.audio,
            ),
            text_rows=context.text_rows,
            across=self._across_step(
                context.rotations,
                row_times if use_cross_timestep else video_times,
                row_times if use_cross_timestep else audio_times,
                connected_rows,
            ),
        )
        return LTX2OpenStep(
            self._embed_video(video, keyframe_tokens),
            self.audio_proj_in(audio.to(self.dtype)),
            block_step,
            video_embedded,
            audio_embedded,
        )

    def close_step(self, step: LTX2OpenStep) -> LTX2Velocity:
        """Everything after the blocks, given the streams as the last block leaves them."""
        return LTX2Velocity(
            self.proj_out(_normed(step.video, self.scale_shift_table, step.video_embedded)),
            self.audio_proj_out(
                _normed(step.audio, self.audio_scale_shift_table, step.audio_embedded)
            ),
        )

    @torch.no_grad()
    def prepare_for_inference(self) -> None:
        """Fuse projections of the same input, in place; the outputs stay the same.

        Call it after the weights are loaded: parameter names are no longer the checkpoint's.
        """
        self.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, SelfAttention | SourceAttention):
                module.fuse_projections()

    def compile_blocks(self) -> None:
        """Let torch.compile make kernels for one block, which serve all: the blocks are alike.

        A batch of another size is compiled anew, then for any size.
        """
        torch._dynamo.config.recompile_limit = MAX_COMPILED
        # Here and not where it is defined: the mark imports the compiler, which takes a second.
        torch.compiler.assume_constant_result(multiplies_fp8)
        for block in self.transformer_blocks:
            block.compile()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which the network computes."""
        return self.proj_in.weight.dtype

    def _embed_video(self, video: Tensor, keyframe_tokens: Tensor | None) -> Tensor:
        embedded = self.proj_in(video.to(self.dtype))
        if keyframe_tokens is None:
            return embedded
        if not self.config.has_keyframe_embedding:
            raise ValueError("this LTX-2 transformer has no keyframe embedding: only LTX-2.5 has")
        marks = keyframe_tokens[..., None].to(embedded.dtype)
        return embedded + marks * self.keyframes_abs_pos_embedding

    def _across_step(
        self,
        rotations: Rotations,
        video_times: Tensor,
        audio_times: Tensor,
        rows: Tensor | None,
    ) -> AcrossStep | None:
        """What the connected rows' attentions across take: times (B, G), already scaled."""
        video_rotation, audio_rotation = rotations.video_across, rotations.audio_across
        if rows is not None:
            if rows.shape[0] == 0:
                return None
            video_rotation, audio_rotation = video_rotation.rows(rows), audio_rotation.rows(rows)
            video_times = video_times.index_select(0, rows)
            audio_times = audio_times.index_select(0, rows)
        gate_scale = (
            self.config.cross_timestep_scale_multiplier / self.config.timestep_scale_multiplier
        )
        return AcrossStep(
            rows=rows,
            video_modulation=self.av_cross_attn_video_scale_shift(video_times)[0],
            audio_modulation=self.av_cross_attn_audio_scale_shift(audio_times)[0],
            video_gate=self.av_cross_attn_video_a2v_gate(video_times * gate_scale)[0],
            audio_gate=self.av_cross_attn_audio_v2a_gate(audio_times * gate_scale)[0],
            video_rotation=video_rotation,
            audio_rotation=audio_rotation,
        )


class CaptionProjection(nn.Module):
    """From the connectors' width to a stream's: two linear layers with GELU (tanh) between."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, out_features)
        self.linear_2 = nn.Linear(out_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(T, S, in_features) -> (T, S, out_features)."""
        return self.linear_2(F.gelu(self.linear_1(x), approximate="tanh"))


def _normed(x: Tensor, table: Tensor, embedded: Tensor) -> Tensor:
    """Layer norm of x (B, N, C), shifted and scaled by the table plus the embedded timesteps."""
    shift, scale = layer_values(table, embedded[:, :, None])
    return modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale)
