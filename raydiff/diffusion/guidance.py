"""Classifier-free guidance with a scale and a rescale of its own for each row."""

import torch
from torch import Tensor


def combine(negative: Tensor, positive: Tensor, scale: Tensor, rescale: Tensor) -> Tensor:
    """Guide predictions (A, ...) from the negative towards and past the positive prompt's.

    `scale` (A,) is guidance_scale. `rescale` (A,) is guidance_rescale: the share to which each
    row's standard deviation is brought back to the positive's (arXiv 2305.08891, section 3.4).
    """
    per_row = (-1, *[1] * (positive.ndim - 1))
    scale, rescale = scale.view(per_row), rescale.view(per_row)
    guided = negative + scale * (positive - negative)
    dims = tuple(range(1, positive.ndim))
    wanted = positive.std(dim=dims, keepdim=True)
    rescaled = guided * (wanted / guided.std(dim=dims, keepdim=True))
    return torch.where(rescale > 0, rescale * rescaled + (1 - rescale) * guided, guided)
