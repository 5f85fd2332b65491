"""How far a tensor is from what it should be."""

from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference as a share of the norm of what was expected."""
    assert actual.shape == expected.shape
    exact = expected.double()
    return float((actual.double() - exact).norm() / exact.norm())
