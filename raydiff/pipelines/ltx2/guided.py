"""Guidance around LTX-2's transformer, each row of the batch with passes and scales of its own.

What texts and positions contribute to every step is computed once for the batch. Passes that
no active row needs are not run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from raydiff.diffusion.guidance import per_row
from raydiff.diffusion.x0_guidance import Weaker, guide
from raydiff.models.ltx2.rope import LatentSize
from raydiff.models.ltx2.transformer import LTX2Context, LTX2Transformer
from raydiff.video_settings import PASS_KINDS, PassKind, RowGuidance


class Clean(NamedTuple):
    """What a batch's active rows would be without noise, as far as can be told."""

    video: Tensor
    """(A, N, C) float32."""
    audio: Tensor
    """(A, M, C') float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Forward:
    """One forward pass: its lines, each an active row in one kind of pass."""

    kinds: tuple[tuple[PassKind, int], ...]
    """In order, the kinds it runs and how many lines each has."""
    positions: Tensor  # (L,) int64: indices into the active rows
    context: LTX2Context  # L rows
    moving: Tensor | None
    """(L, F): 0 at latent frames that are given, 1 at others; None where none is given."""
    connected: Tensor | None
    """(K,) int64: lines whose streams see each other; None where all do."""
    perturbed: dict[int, Tensor] | None
    """By block, (L,) bool: lines whose self attentions it leaves out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scales:
    """One stream's scales of the active rows, on the device."""

    weights: dict[PassKind, Tensor]  # (K,) each, of the rows that have the pass
    rescale: Tensor  # (A,)


@dataclass(frozen=True, kw_only=True, slots=True)
class _ActiveRows:
    """What a step needs while the same rows are active."""

    forwards: tuple[_Forward, ...]
    rows_of: dict[PassKind, Tensor]  # (K,) int64: indices into the active rows
    video: _Scales
    audio: _Scales


class GuidedTransformer:
    """Predicts the clean latents of a batch's active rows; built once per batch and stage."""

    def __init__(
        self,
        transformer: LTX2Transformer,
        context: LTX2Context,
        guidance: Sequence[RowGuidance],
        *,
        latent_size: LatentSize,
        has_first_frame: Sequence[bool],
        is_sequential: bool,
    ) -> None:
        """`context` has the rows with a negative pass under their negative prompts, in order, and
        after them all rows under their prompts. `has_first_frame` says whose first latent frame
        is given. Sequential: one forward for each kind of pass, instead of one for all."""
        self._transformer = transformer
        self._context = context
        self._guidance = list(guidance)
        self._num_frames = latent_size.num_frames
        self._has_first_frame = list(has_first_frame)
        self._is_sequential = is_sequential
        self._device = context.video_text.device
        self._negative_rows = negative_rows(guidance)
        self._active: tuple[tuple[int, ...], _ActiveRows] | None = None

    def __call__(self, video: Tensor, audio: Tensor, sigmas: Tensor, rows: Sequence[int]) -> Clean:
        """Predict from noisy video (A, N, C) and audio (A, M, C') float32 at sigmas (A,)."""
        active = self._active_rows(tuple(rows))
        predicted: dict[PassKind, Clean] = {}
        for forward in active.forwards:
            predicted |= self._run(forward, video, audio, sigmas)
        return Clean(
            _guide({kind: clean.video for kind, clean in predicted.items()}, active, active.video),
            _guide({kind: clean.audio for kind, clean in predicted.items()}, active, active.audio),
        )

    def _run(
        self, forward: _Forward, video: Tensor, audio: Tensor, sigmas: Tensor
    ) -> dict[PassKind, Clean]:
        video, audio, sigmas = (
            tensor.index_select(0, forward.positions) for tensor in (video, audio, sigmas)
        )
        velocity = self._transformer(
            video,
            audio,
            forward.context,
            sigmas=sigmas,
            video_sigmas=None if forward.moving is None else sigmas[:, None] * forward.moving,
            connected_rows=forward.connected,
            perturbed=forward.perturbed,
        )
        clean_video = video - per_row(sigmas, video) * velocity.video.float()
        clean_audio = audio - per_row(sigmas, audio) * velocity.audio.float()
        sizes = [num_lines for _, num_lines in forward.kinds]
        parts = zip(clean_video.split(sizes), clean_audio.split(sizes), strict=True)
        return {kind: Clean(*part) for (kind, _), part in zip(forward.kinds, parts, strict=True)}

    def _active_rows(self, rows: tuple[int, ...]) -> _ActiveRows:
        """Return what the step needs, rebuilt only when a row has finished."""
        if self._active is None or self._active[0] != rows:
            self._active = (rows, self._select(rows))
        return self._active[1]

    def _select(self, rows: tuple[int, ...]) -> _ActiveRows:
        passes = [self._guidance[row].passes for row in rows]
        positions = {
            kind: [position for position, kinds in enumerate(passes) if kind in kinds]
            for kind in PASS_KINDS
        }
        kinds = [kind for kind in PASS_KINDS if positions[kind]]
        groups = [[kind] for kind in kinds] if self._is_sequential else [kinds]
        return _ActiveRows(
            forwards=tuple(
                self._forward(rows, {kind: positions[kind] for kind in group}) for group in groups
            ),
            rows_of={kind: self._index(positions[kind]) for kind in kinds},
            video=self._scales(rows, positions, "video"),
            audio=self._scales(rows, positions, "audio"),
        )

    def _forward(self, rows: tuple[int, ...], positions: dict[PassKind, list[int]]) -> _Forward:
        lines = [(kind, position) for kind, some in positions.items() for position in some]
        connected = [line for line, (kind, _) in enumerate(lines) if kind != "isolated"]
        return _Forward(
            kinds=tuple((kind, len(some)) for kind, some in positions.items()),
            positions=self._index([position for _, position in lines]),
            context=self._context.rows(
                self._index([self._context_row(kind, rows[position]) for kind, position in lines])
            ),
            moving=self._moving([rows[position] for _, position in lines]),
            connected=None if len(connected) == len(lines) else self._index(connected),
            perturbed=self._perturbed([(kind, rows[position]) for kind, position in lines]),
        )

    def _context_row(self, kind: PassKind, row: int) -> int:
        if kind == "negative":
            return self._negative_rows.index(row)
        return len(self._negative_rows) + row

    def _moving(self, rows: list[int]) -> Tensor | None:
        is_given = [self._has_first_frame[row] for row in rows]
        if not any(is_given):
            return None
        moving = torch.ones(len(rows), self._num_frames)
        moving[:, 0] = 1 - torch.tensor(is_given, dtype=torch.float32)
        return moving.to(self._device)

    def _perturbed(self, lines: list[tuple[PassKind, int]]) -> dict[int, Tensor] | None:
        blocks = [
            self._guidance[row].stg_blocks if kind == "perturbed" else () for kind, row in lines
        ]
        masks = {
            block: torch.tensor([block in some for some in blocks], device=self._device)
            for block in sorted(set().union(*blocks))
        }
        return masks or None

    def _scales(
        self,
        rows: tuple[int, ...],
        positions: dict[PassKind, list[int]],
        stream: str,
    ) -> _Scales:
        scales = [getattr(self._guidance[row], stream) for row in rows]
        # A row without other passes keeps its prediction to the bit, whatever its neighbours do.
        rescale = [
            scale.guidance_rescale if len(self._guidance[row].passes) > 1 else 0.0
            for row, scale in zip(rows, scales, strict=True)
        ]
        return _Scales(
            weights={
                kind: self._floats([scales[position].weight(kind) for position in some])
                for kind, some in positions.items()
            },
            rescale=self._floats(rescale),
        )

    def _index(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _floats(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)


def negative_rows(guidance: Sequence[RowGuidance]) -> list[int]:
    """Return the rows that are run under their negative prompts too."""
    return [row for row, one in enumerate(guidance) if "negative" in one.passes]


def _guide(x0: Mapping[PassKind, Tensor], active: _ActiveRows, scales: _Scales) -> Tensor:
    weaker = [
        Weaker(active.rows_of[kind], x0[kind], scales.weights[kind])
        for kind in PASS_KINDS
        if kind != "positive" and kind in x0
    ]
    return guide(x0["positive"], weaker, scales.rescale)
