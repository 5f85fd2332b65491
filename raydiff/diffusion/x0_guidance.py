"""LTX-2's guidance: away from weaker predictions of the clean latents, each row and each stream
(video, audio) with scales of its own.

A row's weaker predictions are those under its negative prompt (classifier-free guidance), with
self attention left out in some blocks (STG, arXiv 2411.18664) and with video and audio not seeing
each other (modality guidance). A pass that neither stream of a row has a use for is not run.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from raydiff.diffusion.guidance import per_row, rescaled


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
