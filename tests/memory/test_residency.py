"""Residency: components come for their phase and leave to the very tensors they had on the host.

The meta device stands for the GPU: what computes there gives meta tensors, and a weight left on the
host raises.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from raydiff.memory.profiles import Cleanup, Profile, load_profile
from raydiff.memory.residency import Residency, resting_device


def away(cleanup: Cleanup) -> Profile:
    """Return a profile that computes everything but text on the stand-in for a GPU."""
    devices = {"text_encoder": "cpu", "unet": "meta", "vae": "meta"}
    return replace(load_profile("gpu_poor"), cleanup=cleanup, devices=devices)


def components() -> dict[str, nn.Module]:
    """Return three small networks with weights at every depth."""
    return {
        name: nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)))
        for name in ("text_encoder", "unet", "vae")
    }


def where(module: nn.Module) -> set[str]:
    """Return the kinds of devices that a module's weights are on."""
    return {parameter.device.type for parameter in module.parameters()}


@torch.inference_mode()
@pytest.mark.parametrize("cleanup", ["phase", "step"])
def test_components_come_for_their_phase_and_leave_unchanged(cleanup: Cleanup) -> None:
    modules = components()
    before = {name: [p.data_ptr() for p in module.parameters()] for name, module in modules.items()}
    residency = Residency(modules, away(cleanup))
    x = torch.randn(2, 4)
    for name in ("text_encoder", "unet", "vae", "unet"):
        device = residency.device_of(name)
        with residency.on_device(name):
            output = modules[name](x.to(device))
            others = {other for other in modules if other != name}
            assert all(where(modules[other]) == {"cpu"} for other in others)
            comes_whole = name == "vae" or (name == "unet" and cleanup == "phase")
            assert where(modules[name]) == ({"meta"} if comes_whole else {"cpu"})
        assert output.device.type == device.type
        assert where(modules[name]) == {"cpu"}
    after = {name: [p.data_ptr() for p in module.parameters()] for name, module in modules.items()}
    assert after == before


def test_nothing_moves_when_everything_stays() -> None:
    modules = components()
    residency = Residency(modules, load_profile("cpu_only"))
    with residency.on_device("unet", "vae"):
        assert where(modules["unet"]) == {"cpu"}


def test_an_error_in_a_phase_still_frees_it() -> None:
    modules = components()
    residency = Residency(modules, away("phase"))
    with pytest.raises(ValueError, match="in the phase"), residency.on_device("unet"):
        raise ValueError("in the phase")
    assert where(modules["unet"]) == {"cpu"}


def test_components_rest_where_they_compute_only_if_they_stay() -> None:
    assert resting_device("unet", load_profile("full_gpu")).type == "cuda"
    assert resting_device("unet", load_profile("balanced")).type == "cpu"
    assert resting_device("vae", load_profile("extreme")).type == "cpu"
    assert resting_device("unet", load_profile("cpu_only")).type == "cpu"
