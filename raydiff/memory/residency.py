"""Residency: which component's weights are on the GPU, moved at phase borders or layer by layer.

Weights that leave the GPU are never copied back: the host copy is kept and pointed to again.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from raydiff.memory.profiles import Profile, component_kind


class Residency:
    """Brings components to the device they compute on, and frees it by the profile's cleanup."""

    def __init__(self, modules: Mapping[str, nn.Module], profile: Profile) -> None:
        """Take modules as they were loaded: on the GPU if they stay there, else on the host."""
        self._modules = dict(modules)
        self._profile = profile
        self._host = {name: _tensors(module) for name, module in self._modules.items()}
        for name, module in self._modules.items():
            if self._visits_by_layer(name):
                _visit_layer_by_layer(module, self.device_of(name))

    def device_of(self, component: str) -> torch.device:
        """Return the device that a component computes on."""
        return compute_device(component, self._profile)

    @contextmanager
    def on_device(self, *components: str) -> Iterator[None]:
        """Hold components on their compute devices for one phase."""
        moving = [name for name in components if self._moves(name)]
        for name in moving:
            _point_to(self._modules[name], _copies(self._host[name], self.device_of(name)))
        try:
            yield
        finally:
            for name in moving:
                _point_to(self._modules[name], self._host[name])
            if moving or self._profile.cleanup == "step":
                torch.cuda.empty_cache()

    def _moves(self, component: str) -> bool:
        """Whether the component comes whole for its phase."""
        return self._is_away(component) and not self._visits_by_layer(component)

    def _visits_by_layer(self, component: str) -> bool:
        """What denoises alone: others are small, and a tiled VAE would come again for every
        tile."""
        is_denoiser = component_kind(component) == "unet"
        return is_denoiser and self._profile.cleanup == "step" and self._is_away(component)

    def _is_away(self, component: str) -> bool:
        """Whether the component computes elsewhere than where it rests."""
        return self.device_of(component) != resting_device(component, self._profile)


def compute_device(component: str, profile: Profile) -> torch.device:
    """Return the device that the profile lets a component compute on."""
    return torch.device(profile.devices[component_kind(component)])


def resting_device(component: str, profile: Profile) -> torch.device:
    """Return the device that a component is loaded to: where it waits between its phases."""
    device = compute_device(component, profile)
    return device if profile.cleanup == "none" else torch.device("cpu")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict([*module.named_parameters(), *module.named_buffers()])


def _copies(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: _copy(tensor, device) for name, tensor in tensors.items()}


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    copy = tensor.detach().to(device, non_blocking=True)
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(copy, requires_grad=False) if is_parameter else copy


def _point_to(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, tensor)


def _visit_layer_by_layer(module: nn.Module, device: torch.device) -> None:
    """Let each layer's weights come to the device for its own forward pass only."""
    for layer in module.modules():
        own: dict[str, Tensor] = dict(layer.named_parameters(recurse=False))
        if not own:
            continue

        def bring(layer: nn.Module, _: object, own: dict[str, Tensor] = own) -> None:
            _point_to(layer, _copies(own, device))

        def leave(layer: nn.Module, _: object, __: object, own: dict[str, Tensor] = own) -> None:
            _point_to(layer, own)

        layer.register_forward_pre_hook(bring)
        layer.register_forward_hook(leave)
