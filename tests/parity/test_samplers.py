"""Every sampler against the diffusers scheduler it stands for, driven by the same smooth model."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_euler_ancestral_discrete, scheduling_lms_discrete
from torch import Tensor

from raydiff.diffusion.denoise import DenoiseState, RowPlan, row_table
from raydiff.diffusion.noise import draw, row_generators
from raydiff.diffusion.schedule import (
    ScheduleConfig,
    alphas_cumprod,
    sigma_steps,
    solver_steps,
)
from raydiff.request import SAMPLERS

# numpy 2 warns about how diffusers turns its tensors into arrays.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (4, 6, 8)
SD = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
REFERENCES = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
STOCHASTIC = ("euler_ancestral", "dpmpp_2m_sde", "lcm")
SOLVERS = ("dpmpp_2m", "dpmpp_2m_sde", "unipc")
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = [
    (sampler, prediction)
    for sampler in SAMPLERS
    for prediction in ("epsilon", "v_prediction", "sample")
    if prediction != "sample" or sampler not in ("euler_ancestral", "pndm")
]
TOLERANCE = 1e-5
"""Largest difference over the largest latent. Both sides are float32 after up to 31 evaluations;
measured here: 1e-6 or less, but up to 8e-6 for the reference's long Heun, LMS and Euler sums."""


def draw_float32(shape, generator, device, dtype):
    return draw(generator, tuple(shape[1:])).to(dtype)


def make_model(seed: int = 0):
    """Return a smooth random map of latents and timestep, the same for ours and theirs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(4, 4, generator=generator) * 0.4
    frequency = torch.rand(4, 1, 1, generator=generator) * 0.01

    def model(latents: Tensor, timesteps: Tensor) -> Tensor:
        phase = timesteps.to(latents.dtype).view(-1, 1, 1, 1) * frequency
        mixed = (mix.to(latents.dtype)[None, :, :, None, None] * latents[:, None]).sum(2)
        return torch.tanh(mixed + torch.sin(phase)) + 0.5 * latents

    return model


def make_reference(sampler: str, config: dict):
    """Return the diffusers scheduler of `sampler`, by from_config as its pipelines are switched."""
    class_name, extra = REFERENCES[sampler]
    classes = {"LMSDiscreteScheduler": scheduling_lms_discrete.LMSDiscreteScheduler}
    scheduler_class = classes.get(class_name) or getattr(diffusers, class_name)
    return scheduler_class.from_config(config, **extra)


class GaussLegendre:
    """Stands for scipy.integrate, which diffusers' LMS needs and the tests do not install: both
    are exact for its cubics."""

    @staticmethod
    def quad(function, start, end, epsrel):
        points, weights = np.polynomial.legendre.leggauss(4)
        half, middle = (float(end) - float(start)) / 2, (float(end) + float(start)) / 2
        values = [float(function(middle + half * point)) for point in points]
        return half * float(np.dot(weights, values)), 0.0


scheduling_lms_discrete.integrate = GaussLegendre


def run_reference(sampler, config, plan, seed, init_latents, model, dtype=torch.float32):
    """Denoise one row as StableDiffusionPipeline and its Img2Img twin do."""
    scheduler = make_reference(sampler, config)
    scheduler.set_timesteps(plan.num_inference_steps)
    if dtype == torch.float64:
        to_float64(scheduler)
    (generator,) = row_generators([seed])
    noise = draw([generator], SHAPE).to(dtype)
    timesteps = scheduler.timesteps
    if plan.strength is None:
        latents = noise * scheduler.init_noise_sigma
    else:
        kept = min(int(plan.num_inference_steps * plan.strength), plan.num_inference_steps)
        begin = (plan.num_inference_steps - kept) * scheduler.order
        timesteps = timesteps[begin:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        latents = scheduler.add_noise(init_latents.to(dtype), noise, timesteps[:1])
    extra = {"generator": [generator]} if sampler in STOCHASTIC else {}
    if sampler == "ddim":
        extra = {"generator": [generator], "eta": plan.eta}
    inputs = []
    for timestep in timesteps:
        scaled = scheduler.scale_model_input(latents, timestep)
        inputs.append(timestep)
        answer = model(scaled, timestep[None])
        latents = scheduler.step(answer, timestep, latents, **extra, return_dict=False)[0]
    return latents, [float(timestep) for timestep in inputs]


def to_float64(scheduler) -> None:
    for name in ("sigmas", "alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())


def run_ours(config, plans, seeds, init_latents, model):
    generators = row_generators(seeds)
    state = DenoiseState.start(
        plans,
        ScheduleConfig.from_dict(config),
        noise=draw(generators, SHAPE),
        init_latents=init_latents,
        generators=generators,
    )
    seen = [[] for _ in plans]
    while not state.is_done:
        latents, timesteps, rows = state.model_input()
        for row, timestep in zip(rows, timesteps.tolist(), strict=True):
            seen[row].append(timestep)
        state.step(model(latents, timesteps))
    return state.latents, seen


def assert_same_latents(sampler, config, plan, *, seed=5, dtype=torch.float32):
    """Denoise one row with both and compare timesteps (equal) and latents (TOLERANCE)."""
    model = make_model()
    init = torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(seed + 1))
    expected, timesteps = run_reference(sampler, config, plan, seed, init, model, dtype)
    latents, (seen,) = run_ours(config, [plan], [seed], [init], model)
    assert seen == timesteps
    assert torch.isfinite(expected).all()
    error = (latents - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE, f"{plan}: {error:.2e}"


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("sampler", "prediction"), PREDICTIONS)
def test_txt2img(sampler, prediction, spacing):
    config = {**SD, "prediction_type": prediction, "timestep_spacing": spacing}
    for num_steps in (1, 2, 3, 7, 20, 30):
        plan = RowPlan(sampler=sampler, num_inference_steps=num_steps)
        assert_same_latents(sampler, config, plan)


@pytest.mark.parametrize("strength", [0.06, 0.35, 0.8, 0.97, 1.0])
@pytest.mark.parametrize(("sampler", "prediction"), PREDICTIONS)
def test_img2img(sampler, prediction, strength):
    for spacing in SPACINGS:
        config = {**SD, "prediction_type": prediction, "timestep_spacing": spacing}
        plan = RowPlan(sampler=sampler, num_inference_steps=17, strength=strength)
        assert_same_latents(sampler, config, plan)


@pytest.mark.parametrize("curve", ["use_karras_sigmas", "use_exponential_sigmas"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_karras_and_exponential_sigmas(sampler, prediction, curve):
    for spacing in SPACINGS:
        config = {**SD, "prediction_type": prediction, "timestep_spacing": spacing, curve: True}
        for num_steps, strength in ((3, None), (20, None), (12, 0.6)):
            plan = RowPlan(sampler=sampler, num_inference_steps=num_steps, strength=strength)
            assert_same_latents(sampler, config, plan)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_zero_terminal_snr(sampler, spacing, monkeypatch):
    config = {
        **SD,
        "prediction_type": "v_prediction",
        "timestep_spacing": spacing,
        "rescale_betas_zero_snr": True,
    }
    # In float32 the reference loses digits stepping down from sigma 4096: compare with it in
    # float64, from the same float32 noise.
    monkeypatch.setattr(scheduling_euler_ancestral_discrete, "randn_tensor", draw_float32)
    dtype = torch.float64 if sampler in ("euler", "euler_ancestral") else torch.float32
    for num_steps, strength in ((5, None), (20, None), (12, 0.6)):
        plan = RowPlan(sampler=sampler, num_inference_steps=num_steps, strength=strength)
        assert_same_latents(sampler, config, plan, dtype=dtype)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "lcm", "euler"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_clip_sample(sampler, prediction):
    config = {**SD, "prediction_type": prediction, "clip_sample": True, "clip_sample_range": 0.7}
    for num_steps, strength in ((8, None), (12, 0.6)):
        plan = RowPlan(sampler=sampler, num_inference_steps=num_steps, strength=strength)
        assert_same_latents(sampler, config, plan)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_ddim_eta(prediction, eta):
    for spacing in SPACINGS:
        config = {**SD, "prediction_type": prediction, "timestep_spacing": spacing}
        for num_steps, strength in ((6, None), (20, None), (12, 0.6)):
            plan = RowPlan(
                sampler="ddim", num_inference_steps=num_steps, strength=strength, eta=eta
            )
            assert_same_latents("ddim", config, plan)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "option",
    [
        {"final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False, "euler_at_final": True},
        {"solver_type": "heun"},
        {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        {"set_alpha_to_one": True},
        {"steps_offset": 0},
        {"original_inference_steps": 40, "timestep_scaling": 7.0},
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"trained_betas": np.linspace(0.001, 0.02, 1000).tolist()},
    ],
    ids=lambda option: "-".join(option),
)
def test_scheduler_options(sampler, option):
    for num_steps, strength in ((8, None), (20, None), (18, 0.6)):
        plan = RowPlan(sampler=sampler, num_inference_steps=num_steps, strength=strength)
        assert_same_latents(sampler, {**SD, **option}, plan)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("stored_class", "stored"),
    [
        ("DDIMScheduler", {**SD, "prediction_type": "v_prediction", "skip_prk_steps": True}),
        ("PNDMScheduler", {**SD, "skip_prk_steps": True}),
        ("EulerDiscreteScheduler", {**SD, "timestep_spacing": "leading", "sample_max_value": 1.0}),
        ("DPMSolverMultistepScheduler", {"prediction_type": "epsilon"}),
        ("UniPCMultistepScheduler", {"solver_order": 2}),
    ],
)
def test_keys_left_out_take_the_samplers_own_default(sampler, stored_class, stored):
    pipeline_scheduler = getattr(diffusers, stored_class).from_config(stored)
    config = {"_class_name": stored_class, **stored}
    extra = REFERENCES[sampler][1]
    switched = type(make_reference(sampler, config)).from_config(pipeline_scheduler.config, **extra)
    switched.set_timesteps(9)
    table = row_table(
        RowPlan(sampler=sampler, num_inference_steps=9), ScheduleConfig.from_dict(config)
    )
    np.testing.assert_array_equal(table.timesteps.astype(np.float32), switched.timesteps.float())
    assert table.noise_scale == pytest.approx(float(switched.init_noise_sigma), rel=1e-7)
    plan = RowPlan(sampler=sampler, num_inference_steps=9)
    assert_same_latents(sampler, {**switched.config}, plan)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("curve", ["none", "use_karras_sigmas", "use_exponential_sigmas"])
@pytest.mark.parametrize("sampler", ["euler", "lms", "heun", "dpmpp_2m", "unipc"])
def test_sigmas_and_timesteps_are_equal(sampler, curve, spacing):
    config = {**SD, "timestep_spacing": spacing, curve: True}
    schedule = ScheduleConfig.from_dict(config).for_sampler(sampler)
    reference = make_reference(sampler, config)
    for num_steps in (1, 2, 3, 7, 20, 30, 50, 150):
        reference.set_timesteps(num_steps)
        steps = solver_steps if sampler in SOLVERS else sigma_steps
        timesteps, sigmas = steps(schedule, num_steps)
        their_timesteps, their_sigmas = reference.timesteps.numpy(), reference.sigmas.numpy()
        if sampler == "heun":
            their_timesteps, their_sigmas = (
                np.append(their_timesteps[:1], their_timesteps[1::2]),
                np.concatenate([their_sigmas[:1], their_sigmas[1:-1:2], their_sigmas[-1:]]),
            )
        np.testing.assert_array_equal(timesteps.astype(np.float32), their_timesteps)
        np.testing.assert_array_equal(sigmas.astype(np.float32), their_sigmas)


def test_anchors_of_sdxl_euler():
    config = ScheduleConfig.from_dict(
        {**SD, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
    )
    timesteps, sigmas = sigma_steps(config.for_sampler("euler"), 4)
    assert timesteps.tolist() == [751, 501, 251, 1]
    np.testing.assert_allclose(sigmas, [4.116698, 1.623693, 0.698399, 0.041314, 0], atol=1e-5)
    four = row_table(RowPlan(sampler="euler", num_inference_steps=4), config)
    assert four.noise_scale == pytest.approx(4.236414, abs=1e-5)
    timesteps, sigmas = sigma_steps(config.for_sampler("euler"), 30)
    assert timesteps[:3].tolist() == [958, 925, 892]
    np.testing.assert_allclose(sigmas[:3], [11.476851, 9.543586, 8.004313], atol=1e-5)
    np.testing.assert_allclose(sigmas[-3:], [0.182166, 0.041314, 0], atol=1e-5)
    thirty = row_table(RowPlan(sampler="euler", num_inference_steps=30), config)
    assert thirty.noise_scale == pytest.approx(11.520334, abs=1e-5)


def test_anchors_of_sd21():
    config = ScheduleConfig.from_dict(SD)
    alphas = alphas_cumprod(config.for_sampler("ddim"))
    assert alphas[0] == pytest.approx(0.99914998, abs=1e-7)
    assert alphas[999] == pytest.approx(0.00466010, abs=1e-7)
    ddim = row_table(RowPlan(sampler="ddim", num_inference_steps=4), config)
    assert ddim.timesteps.tolist() == [751, 501, 251, 1]
    pndm = row_table(RowPlan(sampler="pndm", num_inference_steps=4), config)
    assert pndm.timesteps.tolist() == [751, 501, 501, 251, 1]
