"""One block of the LTX-2 transformer: two streams that attend to themselves, to the text and to
each other, each followed by a feed-forward layer."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydiff.models.ltx2.adaln import add_gated, layer_values, modulate
from raydiff.models.ltx2.attention import CrossModalAttention, SelfAttention, TextAttention
from raydiff.models.ltx2.rope import Rotation
from raydiff.models.ltx2.transformer_config import LTX2TransformerConfig


class StreamStep(NamedTuple):
    """What every block's part for one stream takes in a step."""

    modulation: Tensor
    """(B, G, 6 or 9, C): shift, scale and gate of self attention, of feed-forward, of text."""
    text: Tensor
    """(T, S, C): the distinct texts."""
    text_modulation: Tensor | None
    """(B, 1, 2, C): shift and scale of the text; None where they do not depend on the step."""
    rotation: Rotation


class AcrossStep(NamedTuple):
    """What the attentions between the streams take in a step: K rows, those that have them."""

    rows: Tensor | None
    """(K,) int64; None for all rows."""
    video_modulation: Tensor
    """(K, G, 4, C): scale and shift of audio-to-video, then of video-to-audio."""
    audio_modulation: Tensor
    video_gate: Tensor
    """(K, G, 1, C): of what the video takes from the audio."""
    audio_gate: Tensor
    video_rotation: Rotation
    audio_rotation: Rotation


class BlockStep(NamedTuple):
    """What every block takes in a step."""

    video: StreamStep
    audio: StreamStep
    text_rows: Tensor | None
    """(B,) int64: which text each row has; None where row i has text i."""
    across: AcrossStep | None
    """None where no row's streams attend to each other."""


class TextKeysValues(NamedTuple):
    """Keys and values (T, S, 2*C) of the distinct texts in one block, for each stream."""

    video: Tensor
    audio: Tensor


class TransformerBlock(nn.Module):
    """Self attentions, text attentions, attentions across, feed-forward; video, then audio."""

    def __init__(self, config: LTX2TransformerConfig) -> None:
        super().__init__()
        dim, audio_dim = config.dim, config.audio_dim
        video_heads = _attention_options(config, config.num_heads, config.head_dim)
        audio_heads = _attention_options(config, config.audio_num_heads, config.audio_head_dim)
        self.norm_eps = config.norm_eps

        self.attn1 = SelfAttention(dim, dim, **video_heads)
        self.audio_attn1 = SelfAttention(audio_dim, audio_dim, **audio_heads)
        self.attn2 = TextAttention(dim, dim, **video_heads)
        self.audio_attn2 = TextAttention(audio_dim, audio_dim, **audio_heads)
        self.audio_to_video_attn = CrossModalAttention(dim, audio_dim, **audio_heads)
        self.video_to_audio_attn = CrossModalAttention(audio_dim, dim, **audio_heads)
        self.ff = FeedForward(dim, has_bias=config.has_ff_bias)
        self.audio_ff = FeedForward(audio_dim, has_bias=config.has_audio_ff_bias)

        num_values = num_modulation_values(config)
        self.scale_shift_table = _table(num_values, dim)
        self.audio_scale_shift_table = _table(num_values, audio_dim)
        self.prompt_scale_shift_table: nn.Parameter | None = None
        self.audio_prompt_scale_shift_table: nn.Parameter | None = None
        if config.has_text_modulation:
            self.prompt_scale_shift_table = _table(2, dim)
            self.audio_prompt_scale_shift_table = _table(2, audio_dim)
        self.video_a2v_cross_attn_scale_shift_table = _table(5, dim)
        self.audio_a2v_cross_attn_scale_shift_table = _table(5, audio_dim)

    def forward(
        self,
        video: Tensor,
        audio: Tensor,
        step: BlockStep,
        keys_values: TextKeysValues | None = None,
        perturbed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """video (B, N, dim) and audio (B, M, audio_dim) -> the same two after this block.

        `keys_values` come from `text_keys_values`, where they do not depend on the step;
        `perturbed` (B,) marks the rows whose self attentions are left out.
        """
        video_values = layer_values(self.scale_shift_table, step.video.modulation)
        audio_values = layer_values(self.audio_scale_shift_table, step.audio.modulation)
        if keys_values is None:
            keys_values = self._row_keys_values(step)
        elif step.text_rows is not None:
            keys_values = TextKeysValues(*(_rows(item, step.text_rows) for item in keys_values))

        video = self._attend_self(self.attn1, video, video_values, step.video.rotation, perturbed)
        audio = self._attend_self(
            self.audio_attn1, audio, audio_values, step.audio.rotation, perturbed
        )
        video = self._attend_text(self.attn2, video, video_values, keys_values.video)
        audio = self._attend_text(self.audio_attn2, audio, audio_values, keys_values.audio)
        if step.across is not None:
            video, audio = self._attend_across(video, audio, step.across)
        video = self._feed_forward(self.ff, video, video_values)
        audio = self._feed_forward(self.audio_ff, audio, audio_values)
        return video, audio

    def text_keys_values(self, video_text: Tensor, audio_text: Tensor) -> TextKeysValues:
        """Keys and values of texts (T, S, dim) and (T, S, audio_dim) at no particular step."""
        return TextKeysValues(
            self.attn2.keys_values(_modulated_text(video_text, self.prompt_scale_shift_table)),
            self.audio_attn2.keys_values(
                _modulated_text(audio_text, self.audio_prompt_scale_shift_table)
            ),
        )

    def _row_keys_values(self, step: BlockStep) -> TextKeysValues:
        """Of each row's text; rows that share a text share the work, unless the step changes it."""
        video, audio, rows = step.video, step.audio, step.text_rows
        if video.text_modulation is None or audio.text_modulation is None:
            shared = self.text_keys_values(video.text, audio.text)
            return TextKeysValues(*(_rows(item, rows) for item in shared))
        return TextKeysValues(
            self.attn2.keys_values(
                _modulated_text(
                    _rows(video.text, rows), self.prompt_scale_shift_table, video.text_modulation
                )
            ),
            self.audio_attn2.keys_values(
                _modulated_text(
                    _rows(audio.text, rows),
                    self.audio_prompt_scale_shift_table,
                    audio.text_modulation,
                )
            ),
        )

    def _attend_self(
        self,
        attention: SelfAttention,
        x: Tensor,
        values: tuple[Tensor, ...],
        rotation: Rotation,
        perturbed: Tensor | None,
    ) -> Tensor:
        shift, scale, gate = values[:3]
        return add_gated(
            x, attention(modulate(self._norm(x), shift, scale), rotation, perturbed), gate
        )

    def _attend_text(
        self, attention: TextAttention, x: Tensor, values: tuple[Tensor, ...], keys_values: Tensor
    ) -> Tensor:
        if len(values) == 6:
            return x + attention(self._norm(x), keys_values)
        shift, scale, gate = values[6:]
        return add_gated(x, attention(modulate(self._norm(x), shift, scale), keys_values), gate)

    def _attend_across(
        self, video: Tensor, audio: Tensor, step: AcrossStep
    ) -> tuple[Tensor, Tensor]:
        """Both streams take from what the other was before either took."""
        video_rows, audio_rows = _rows(video, step.rows), _rows(audio, step.rows)
        normed_video, normed_audio = self._norm(video_rows), self._norm(audio_rows)
        video_table = self.video_a2v_cross_attn_scale_shift_table
        audio_table = self.audio_a2v_cross_attn_scale_shift_table
        # Scale before shift here, shift before scale everywhere else: as the checkpoints have it.
        v_scale_a2v, v_shift_a2v, v_scale_v2a, v_shift_v2a = layer_values(
            video_table[:4], step.video_modulation
        )
        a_scale_a2v, a_shift_a2v, a_scale_v2a, a_shift_v2a = layer_values(
            audio_table[:4], step.audio_modulation
        )
        (video_gate,) = layer_values(video_table[4:], step.video_gate)
        (audio_gate,) = layer_values(audio_table[4:], step.audio_gate)

        to_video = self.audio_to_video_attn(
            modulate(normed_video, v_shift_a2v, v_scale_a2v),
            modulate(normed_audio, a_shift_a2v, a_scale_a2v),
            step.video_rotation,
            step.audio_rotation,
        )
        to_audio = self.video_to_audio_attn(
            modulate(normed_audio, a_shift_v2a, a_scale_v2a),
            modulate(normed_video, v_shift_v2a, v_scale_v2a),
            step.audio_rotation,
            step.video_rotation,
        )
        video_rows = add_gated(video_rows, to_video, video_gate)
        audio_rows = add_gated(audio_rows, to_audio, audio_gate)
        if step.rows is None:
            return video_rows, audio_rows
        return (
            video.index_copy(0, step.rows, video_rows),
            audio.index_copy(0, step.rows, audio_rows),
        )

    def _feed_forward(self, ff: "FeedForward", x: Tensor, values: tuple[Tensor, ...]) -> Tensor:
        shift, scale, gate = values[3:6]
        return add_gated(x, ff(modulate(self._norm(x), shift, scale)), gate)

    def _norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.norm_eps)


class FeedForward(nn.Module):
    """To four times the width, GELU (tanh), and back."""

    def __init__(self, dim: int, *, has_bias: bool) -> None:
        super().__init__()
        # Three entries, as the checkpoints number them: the middle one was dropout.
        self.net = nn.ModuleList(
            [
                GELUProjection(dim, 4 * dim, has_bias=has_bias),
                nn.Identity(),
                nn.Linear(4 * dim, dim, bias=has_bias),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        return self.net[2](self.net[0](x))


class GELUProjection(nn.Module):
    """A linear layer and GELU (tanh)."""

    def __init__(self, in_features: int, out_features: int, *, has_bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(in_features, out_features, bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        weight, bias = self.proj.weight, self.proj.bias
        # A weight that is elsewhere comes to the device for the layer's own forward pass alone, and
        # one that is trained wants a gradient.
        is_plain = type(self.proj) is nn.Linear and not weight.requires_grad
        if weight.is_cuda and is_plain and bias is not None:
            # On CUDA this is one kernel, whose GELU is the same approximation.
            rows = x.flatten(0, -2)
            out = torch.ops.aten._addmm_activation(bias, rows, weight.t(), use_gelu=True)
            return out.unflatten(0, x.shape[:-1])
        return F.gelu(self.proj(x), approximate="tanh")


def num_modulation_values(config: LTX2TransformerConfig) -> int:
    """Shift, scale and gate of self attention and feed-forward; of the text's queries in 2.3."""
    return 9 if config.has_text_modulation else 6


def _attention_options(
    config: LTX2TransformerConfig, num_heads: int, head_dim: int
) -> dict[str, Any]:
    return {
        "num_heads": num_heads,
        "head_dim": head_dim,
        "norm_eps": config.norm_eps,
        "has_gates": config.has_gated_attention,
        "rope_type": config.rope_type,
    }


def _table(num_values: int, dim: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(num_values, dim))


def _rows(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


def _modulated_text(text: Tensor, table: Tensor | None, values: Tensor | None = None) -> Tensor:
    """text (B, S, C), scaled and shifted by the layer's table (2, C) and, if any, the step's."""
    if table is None:
        return text
    own = table[None, None]  # (1, 1, 2, C)
    shift, scale = (own if values is None else own + values).unbind(2)
    return modulate(text, shift, scale)
