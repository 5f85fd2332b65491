"""What text encoders are taught beside denoising: to say, slot by slot, what a caption asks for.

The last tokens of every caption are padding, and padding sees all that comes before it. Each of the
last six speaks of one colour's objects, the one before them of the background: a UNet that is told
a scene in this order need not find out from pixels what words in a row mean.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydiff.mini.scenes import BACKGROUNDS, CANVAS, COLORS, MAX_COUNT, SHAPES, SIZES

NUM_SLOTS = 1 + len(COLORS)
"""Tokens at the end of a text; captions leave them free."""
PLACE_WEIGHT = 10.0
"""Of an error in a place or size: they are small numbers beside the other losses."""


class Slots(NamedTuple):
    """What scenes ask for; of a colour that is not there only the count counts."""

    background: Tensor
    """(N,) int64"""
    counts: Tensor
    """(N, colours) int64"""
    shapes: Tensor
    """(N, colours) int64"""
    places: Tensor
    """(N, colours, 3): middle x and y as parts of the canvas, -0.5..0.5, and radius, 0..1."""

    def rows(self, index: Tensor) -> "Slots":
        """Those of some scenes."""
        return Slots(*(one[index] for one in self))


class SlotReader(nn.Module):
    """One linear layer for all colours, one for the background."""

    def __init__(self, embeds_dim: int) -> None:
        super().__init__()
        # The colours too: which slot it is must show, or attention could not pick one out.
        self.num_values = (MAX_COUNT + 1, len(SHAPES), len(COLORS), 3)
        self.color = nn.Linear(embeds_dim, sum(self.num_values))
        self.background = nn.Linear(embeds_dim, len(BACKGROUNDS))

    def loss(self, embeds: Tensor, slots: Slots, is_read: Tensor) -> Tensor:
        """How far the slots of embeds (B, S, C) are from what they are to say, in the rows that
        `is_read` (B,) marks."""
        background = self.background(embeds[:, -NUM_SLOTS]).float()
        said = self.color(embeds[:, 1 - NUM_SLOTS :]).float()  # (B, colours, values)
        counts, shapes, colors, places = said.split(self.num_values, dim=-1)
        own = torch.arange(len(COLORS), device=embeds.device).expand_as(slots.counts)
        is_there = is_read[:, None] & (slots.counts > 0)
        losses = (
            (_cross_entropy(background, slots.background), is_read),
            (_cross_entropy(counts, slots.counts), is_read[:, None].expand_as(is_there)),
            (_cross_entropy(shapes, slots.shapes), is_there),
            (_cross_entropy(colors, own), is_there),
            (PLACE_WEIGHT * (places - slots.places).square().sum(dim=-1), is_there),
        )
        # No boolean index: the step is one CUDA graph, whose shapes are fixed.
        means = [(loss * keep).sum() / keep.sum().clamp(min=1) for loss, keep in losses]
        return torch.stack(means).sum()


def read_slots(tables: Tensor) -> Slots:
    """tables (N, 1 + objects, fields), see `draw.table` -> what their captions ask for."""
    palette = torch.tensor(list(COLORS.values()), dtype=tables.dtype, device=tables.device)
    grounds = torch.tensor(list(BACKGROUNDS.values()), dtype=tables.dtype, device=tables.device)
    objects = tables[:, 1:]
    is_there = objects[..., 3] >= 0  # (N, objects)
    is_of = F.one_hot(_nearest(objects[..., 4:], palette), len(COLORS)) * is_there[..., None]
    counts = is_of.sum(dim=1)

    def mean(values: Tensor) -> Tensor:
        return (is_of * values[..., None]).sum(dim=1) / counts.clamp(min=1)

    x, y, radius, shape = (mean(objects[..., field]) for field in range(4))
    largest = max(most for _, most in SIZES.values())
    places = torch.stack([x / CANVAS - 0.5, y / CANVAS - 0.5, radius / largest], dim=-1)
    return Slots(
        background=_nearest(tables[:, 0, 4:], grounds),
        counts=counts,
        shapes=shape.round().long(),
        places=places,
    )


def _nearest(colors: Tensor, palette: Tensor) -> Tensor:
    """colors (..., 3) -> the place in the palette (P, 3) of the nearest."""
    return (colors[..., None, :] - palette).square().sum(dim=-1).argmin(dim=-1)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """logits (..., K), labels (...) -> (...)."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view_as(
        labels
    )
