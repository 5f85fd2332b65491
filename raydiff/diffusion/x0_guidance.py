"""LTX-2's guidance: away from weaker predictions of the clean latents, each row and each stream
(video, audio) with scales of its own.

A row's weaker predictions are those under its negative prompt (classifier-free guidance), with
self attention left out in some blocks (STG, arXiv 2411.18664) and with video and audio not seeing
each other (modality guidance). A pass that neither stream of a row has a use for is not run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from raydiff.diffusion.guidance import per_row, rescaled

PassKind = Literal["negative", "positive", "perturbed", "isolated"]
PASS_KINDS: tuple[PassKind, ...] = ("negative", "positive", "perturbed", "isolated")
"""In the order in which a batch has them; every row has the positive one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamGuidance:
    """The scales of one stream of one row; these defaults are no guidance."""

    guidance_scale: float = 1.0
    stg_scale: float = 0.0
    modality_scale: float = 1.0
    guidance_rescale: float = 0.0

    def weight(self, kind: PassKind) -> float:
        """Return how far the prediction moves away from that of the pass."""
        return {
            "negative": self.guidance_scale - 1,
            "positive": 0.0,
            "perturbed": self.stg_scale,
            "isolated": self.modality_scale - 1,
        }[kind]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGuidance:
    """The guidance of one row."""

    video: StreamGuidance = StreamGuidance()
    audio: StreamGuidance = StreamGuidance()
    stg_blocks: tuple[int, ...] = ()
    """Blocks whose self attentions the perturbed pass leaves out."""

    @property
    def passes(self) -> tuple[PassKind, ...]:
        """The passes to run for the row: the positive one, and those that a stream moves from.

        As in the reference a scale on the other side of none, below 1 or below 0, asks for no pass
        by itself.
        """
        return tuple(
            kind
            for kind in PASS_KINDS
            if kind == "positive" or self.video.weight(kind) > 0 or self.audio.weight(kind) > 0
        )

    def num_evaluations(self, num_steps: int) -> int:
        """Return the row's NFE: forward passes of so many steps."""
        return num_steps * len(self.passes)


class Weaker(NamedTuple):
    """One pass' predictions to move away from, of the K rows out of A that have it."""

    rows: Tensor
    """(K,) int64."""
    x0: Tensor
    """(K, ...)."""
    weights: Tensor
    """(K,) float32."""


def guide(positive: Tensor, weaker: Sequence[Weaker], rescale: Tensor) -> Tensor:
    """Return the guided prediction (A, ...) of clean latents, given the positive pass' own.

    `rescale` (A,) brings a row's standard deviation back; see `guidance.rescaled`.
    """
    if not weaker:
        return positive
    guided = positive
    for other in weaker:
        towards = positive.index_select(0, other.rows) - other.x0
        moved = guided.index_select(0, other.rows) + per_row(other.weights, towards) * towards
        guided = guided.index_copy(0, other.rows, moved)
    return rescaled(guided, positive, rescale)
