"""A module on the meta device with any tensor names and shapes, to load weights into."""

from collections.abc import Mapping

import torch
from torch import nn


def meta_module(shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    root = nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]
        owner.register_parameter(leaf, nn.Parameter(torch.empty(shape, device="meta")))
    return root
