"""Full-size modules with random weights, made on the device: no checkpoint is needed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def random_module(
    build: Callable[[Any], Any],
    config: Any,
    dtype: torch.dtype,
    device: torch.device | str = "cuda",
) -> Any:
    """Build on the meta device and draw each parameter on `device`, scaled by its fan-in; buffers
    are left as the device's memory was."""
    with torch.device("meta"):
        module: nn.Module = build(config)
    module = module.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    randomise(module)
    return module


def randomise(module: nn.Module) -> None:
    """Draw all parameters where they are."""
    for name, parameter in module.named_parameters():
        data = parameter.data
        if data.ndim > 1:
            data.normal_(std=data[0].numel() ** -0.5)
        elif name.endswith("weight"):
            data.normal_(mean=1.0, std=0.05)
        else:
            data.normal_(std=0.02)
