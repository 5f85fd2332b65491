"""The noise of a row: one CPU generator per row, float32 draws, so that a seed gives the same start
on any device, in any batch, and in the reference library."""

from collections.abc import Sequence

import torch
from torch import Tensor


def row_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return a generator for each row's seed; all later draws of the row go on with it."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def draw(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """Draw standard normal noise (B, *shape), float32 on the CPU, each row from its generator."""
    rows = [
        torch.randn((1, *shape), generator=generator, dtype=torch.float32)
        for generator in generators
    ]
    return torch.cat(rows)
