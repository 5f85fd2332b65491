"""Classifier-free guidance around a UNet, each row of the batch with its own scale.

A row with guidance runs twice, under its negative and its positive prompt; a row without (scale
<= 1) runs once. What the prompts contribute to every step is computed once for the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raydiff.batching import padded_size
from raydiff.diffusion.guidance import combine
from raydiff.models.unet import UNet, UNetContext
from raydiff.pipelines.base import PromptEmbeds


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pass:
    """One forward pass: which active rows it runs, and their context."""

    positions: Tensor  # (N,) int64: indices into the active rows
    context: UNetContext  # N rows
    num_rows: int
    """Rows that count; the rest pad the batch to a fixed size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _ActiveRows:
    """What a step needs while the same rows are active."""

    passes: tuple[_Pass, ...]
    guided: Tensor  # (G,) int64: indices into the active rows
    scale: Tensor  # (G,)
    rescale: Tensor  # (G,)
    has_unguided: bool


class GuidedUNet:
    """Predicts the noise of a batch's active rows; built once per batch."""

    def __init__(
        self,
        forward: Callable[..., Tensor],
        unet: UNet,
        embeds: PromptEmbeds,
        *,
        guidance_scales: Sequence[float],
        guidance_rescales: Sequence[float],
        time_ids: Tensor | None,
        is_sequential: bool,
        has_fixed_sizes: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`forward` is the UNet, compiled or not; `time_ids` is (B, 6) for SDXL."""
        self._forward = forward
        self._scales = list(guidance_scales)
        self._rescales = list(guidance_rescales)
        self._is_sequential = is_sequential
        self._has_fixed_sizes = has_fixed_sizes
        self._dtype = dtype
        self._device = device
        self._guided_rows = [row for row, scale in enumerate(self._scales) if scale > 1]
        self._context = self._precompute(unet, embeds, time_ids)
        self._active: tuple[tuple[int, ...], _ActiveRows] | None = None

    def __call__(self, latents: Tensor, timesteps: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the guided prediction (A, C, h, w) float32 of the active `rows`."""
        active = self._active_rows(tuple(rows))
        latents = latents.to(self._dtype)
        predicted = torch.cat([self._run(latents, timesteps, one) for one in active.passes]).float()
        num_guided = active.guided.shape[0]
        if num_guided == 0:
            return predicted
        negative, positive = predicted[:num_guided], predicted[num_guided:]
        if not active.has_unguided:
            return combine(negative, positive, active.scale, active.rescale)
        guided = combine(negative, positive[active.guided], active.scale, active.rescale)
        return positive.index_copy(0, active.guided, guided)

    def _run(self, latents: Tensor, timesteps: Tensor, one: _Pass) -> Tensor:
        sample = latents.index_select(0, one.positions)
        predicted = self._forward(sample, timesteps.index_select(0, one.positions), one.context)
        return predicted[: one.num_rows]

    def _precompute(self, unet: UNet, embeds: PromptEmbeds, time_ids: Tensor | None) -> UNetContext:
        """Compute the context of every pass: negatives of guided rows, then all positives."""
        guided = torch.tensor(self._guided_rows, dtype=torch.int64)
        pooled, ids = None, None
        if embeds.pooled_prompt_embeds is not None and time_ids is not None:
            negative_pooled = embeds.negative_pooled_prompt_embeds
            pooled = self._rows_of_both(negative_pooled, embeds.pooled_prompt_embeds, guided)
            ids = torch.cat([time_ids[guided], time_ids]).to(self._device)
        return unet.precompute_context(
            self._rows_of_both(embeds.negative_prompt_embeds, embeds.prompt_embeds, guided),
            pooled,
            ids,
        )

    def _rows_of_both(self, negative: Tensor | None, positive: Tensor, guided: Tensor) -> Tensor:
        parts = [positive] if negative is None else [negative[guided.to(negative.device)], positive]
        return torch.cat(parts).to(self._device, self._dtype)

    def _active_rows(self, rows: tuple[int, ...]) -> _ActiveRows:
        """Return what the step needs, rebuilt only when a row has finished."""
        if self._active is None or self._active[0] != rows:
            self._active = (rows, self._select(rows))
        return self._active[1]

    def _select(self, rows: tuple[int, ...]) -> _ActiveRows:
        guided = [position for position, row in enumerate(rows) if self._scales[row] > 1]
        negative = [(p, self._guided_rows.index(rows[p])) for p in guided]
        positive = [(p, len(self._guided_rows) + row) for p, row in enumerate(rows)]
        passes = [negative, positive] if self._is_sequential else [negative + positive]
        return _ActiveRows(
            passes=tuple(self._pass(entries) for entries in passes if entries),
            guided=self._index(guided),
            scale=torch.tensor([self._scales[rows[p]] for p in guided], device=self._device),
            rescale=torch.tensor([self._rescales[rows[p]] for p in guided], device=self._device),
            has_unguided=len(guided) < len(rows),
        )

    def _pass(self, entries: list[tuple[int, int]]) -> _Pass:
        """Build one forward pass from (position among active rows, context row) pairs."""
        num_rows = len(entries)
        if self._has_fixed_sizes:
            entries = entries + [entries[-1]] * (padded_size(num_rows) - num_rows)
        context_rows = [context_row for _, context_row in entries]
        is_whole = context_rows == list(range(self._num_context_rows))
        return _Pass(
            positions=self._index([position for position, _ in entries]),
            context=self._context if is_whole else self._context.rows(self._index(context_rows)),
            num_rows=num_rows,
        )

    @property
    def _num_context_rows(self) -> int:
        return len(self._guided_rows) + len(self._scales)

    def _index(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
