"""How far the autoencoders' posteriors are from the normal distribution, for their trainings."""

from torch import Tensor


def divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """(B, ...) each -> the Kullback-Leibler divergence: of each row its sum, of those the mean."""
    terms = mean.square() + logvar.exp() - 1 - logvar
    return 0.5 * terms.sum(dim=tuple(range(1, mean.ndim))).mean()
