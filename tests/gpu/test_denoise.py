"""Denoising on a GPU: the same latents as on the CPU, and a host that never waits for it."""

import pytest
import torch
from torch import Tensor

from raydiff.diffusion.denoise import DenoiseState, RowPlan
from raydiff.diffusion.noise import draw, row_generators
from raydiff.diffusion.schedule import ScheduleConfig
from raydiff.request import SAMPLERS

pytestmark = pytest.mark.gpu

SHAPE = (4, 16, 24)
PLANS = [
    RowPlan(
        sampler=sampler,
        num_inference_steps=4 + index,
        strength=0.7 if index % 3 == 1 else None,
        eta=0.5 if sampler == "ddim" else 0.0,
    )
    for index, sampler in enumerate(SAMPLERS)
]


def model(latents: Tensor, timesteps: Tensor) -> Tensor:
    phase = torch.sin(timesteps * 0.01).view(-1, 1, 1, 1)
    return torch.tanh(latents.roll(1, dims=1) * 0.6 + phase) + 0.5 * latents


def start(device: str) -> DenoiseState:
    generators = row_generators(range(len(PLANS)))
    noise = draw(generators, SHAPE)
    return DenoiseState.start(
        PLANS,
        ScheduleConfig.from_dict({"clip_sample_range": 2.0, "steps_offset": 1}),
        noise=noise,
        generators=generators,
        init_latents=list(noise.flip(0).split(1)),
        device=device,
    )


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_mixed_batch_never_waits_and_equals_the_cpu():
    on_cpu, on_gpu = start("cpu"), start("cuda")
    try:
        torch.cuda.set_sync_debug_mode("error")
        while not on_gpu.is_done:
            latents, timesteps, _ = on_gpu.model_input()
            on_gpu.step(model(latents, timesteps))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    while not on_cpu.is_done:
        latents, timesteps, _ = on_cpu.model_input()
        on_cpu.step(model(latents, timesteps))
    largest = on_cpu.latents.abs().max()
    assert (on_gpu.latents.cpu() - on_cpu.latents).abs().max() <= 1e-5 * largest
