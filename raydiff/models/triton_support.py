"""Whether a Triton kernel may stand in for torch operations. Triton itself comes only with CUDA
builds of torch, so it is looked up, not imported, until a kernel runs."""

from importlib.util import find_spec

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HAS_TRITON = find_spec("triton") is not None


def can_run_triton(*tensors: Tensor) -> bool:
    """True for CUDA tensors of a supported dtype that need no gradient, where Triton is there."""
    return (
        _HAS_TRITON
        and all(tensor.is_cuda and tensor.dtype in _DTYPES for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )
