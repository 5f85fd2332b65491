"""Classifier-free guidance with a scale and a rescale of its own for each row."""

import torch
from torch import Tensor


def combine(negative: Tensor, positive: Tensor, scale: Tensor, rescale: Tensor) -> Tensor:
    """Guide predictions (A, ...) from the negative towards and past the positive prompt's.

    `scale` (A,) is guidance_scale, `rescale` (A,) guidance_rescale; see `rescaled`.
    """
    guided = negative + per_row(scale, positive) * (positive - negative)
    return rescaled(guided, positive, rescale)


def rescaled(guided: Tensor, positive: Tensor, rescale: Tensor) -> Tensor:
    """Bring the standard deviation of each row of `guided` (A, ...) back to that of `positive`.

    `rescale` (A,) is the share to which that is done (arXiv 2305.08891, section 3.4).
    """
    rescale = per_row(rescale, positive)
    dims = tuple(range(1, positive.ndim))
    wanted = positive.std(dim=dims, keepdim=True)
    whole = guided * (wanted / guided.std(dim=dims, keepdim=True))
    return torch.where(rescale > 0, rescale * whole + (1 - rescale) * guided, guided)


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Return values (A,) so that they multiply the rows of `like` (A, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))
