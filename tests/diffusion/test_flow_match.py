"""Flow-match schedules against diffusers' scheduler and published values; steps of mixed rows."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx2.pipeline_ltx2 import calculate_shift
from diffusers.pipelines.ltx2.utils import DISTILLED_SIGMA_VALUES, STAGE_2_DISTILLED_SIGMA_VALUES

from raydiff.diffusion.flow_match import (
    DISTILLED_SIGMAS,
    REFINE_SIGMAS,
    FlowMatchConfig,
    FlowMatchSteps,
    add_noise,
)
from raydiff.errors import ModelError, RowError

LTX2 = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.42.1",
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
    "shift": 1.0,
    "time_shift_type": "exponential",
    "num_train_timesteps": 1000,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "use_karras_sigmas": False,
}
CONFIGS = {
    "ltx2": LTX2,
    "linear": {**LTX2, "time_shift_type": "linear", "shift_terminal": 0.02},
    "no_terminal": {**LTX2, "shift_terminal": None},
    "fixed": {"shift": 3.0},
    "fixed_and_stretched": {"shift": 1.5, "shift_terminal": 0.05},
    "defaults": {},
    "dynamic_defaults": {"use_dynamic_shifting": True},
}


def config(**changes: object) -> FlowMatchConfig:
    return FlowMatchConfig.from_dict({**LTX2, **changes})


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("num_steps", [2, 8, 30, 40, 101])
def test_schedules_equal_diffusers(options: dict[str, object], num_steps: int) -> None:
    reference = FlowMatchEulerDiscreteScheduler.from_config(options)
    ours = FlowMatchConfig.from_dict(options)
    for num_tokens in (6, 1024, 6144, 24576):
        mu = calculate_shift(
            num_tokens,
            reference.config.base_image_seq_len,
            reference.config.max_image_seq_len,
            reference.config.base_shift,
            reference.config.max_shift,
        )
        even = np.linspace(1.0, 1 / num_steps, num_steps)
        reference.set_timesteps(sigmas=even, mu=mu if options.get("use_dynamic_shifting") else None)
        sigmas = torch.tensor(ours.sigmas(num_steps, num_tokens))
        assert sigmas.shape == reference.sigmas.shape
        assert (sigmas - reference.sigmas).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("options", "num_steps", "num_tokens", "first", "last"),
    [
        (
            LTX2,
            8,
            4096,
            (1, 0.965712, 0.921875, 0.863856, 0.783445),
            (0.664579, 0.471003, 0.1, 0),
        ),
        (LTX2, 40, 4096, (1, 0.996449, 0.992737, 0.988851), (0.420719, 0.337809, 0.233936, 0.1, 0)),
        (LTX2, 30, 4096, (1, 0.994957, 0.989603), (0.266120, 0.1, 0)),
        ({"use_dynamic_shifting": True}, 4, 4096, (1, 0.904531), (0.759511, 0.512844, 0)),
        ({}, 4, 4096, (1, 0.75), (0.5, 0.25, 0)),
    ],
    ids=["ltx2-8", "ltx2-40", "ltx2-30", "flux-dev", "flux-schnell"],
)
def test_anchors(
    options: dict[str, object],
    num_steps: int,
    num_tokens: int,
    first: tuple[float, ...],
    last: tuple[float, ...],
) -> None:
    sigmas = FlowMatchConfig.from_dict(options).sigmas(num_steps, num_tokens)
    assert len(sigmas) == num_steps + 1
    assert sigmas[: len(first)] == pytest.approx(first, abs=1e-5)
    assert sigmas[-len(last) :] == pytest.approx(last, abs=1e-5)


def test_mu_goes_by_the_tokens_there_are_and_beyond_max_shift() -> None:
    assert config().mu(1024) == pytest.approx(0.95)
    assert config().mu(4096) == pytest.approx(2.05)
    assert config().mu(7168) == pytest.approx(3.15)
    assert config().sigmas(8, 6144) != config().sigmas(8, 4096)
    fixed = FlowMatchConfig.from_dict({"shift": 3.0})
    assert fixed.sigmas(8, 6144) == fixed.sigmas(8, 4096)


def test_the_last_sigma_before_0_is_the_terminal_one() -> None:
    assert config().sigmas(30, 6144)[-2] == pytest.approx(0.1, abs=1e-6)
    assert config(shift_terminal=None).sigmas(30, 6144)[-2] > 0.2
    assert config().sigmas(1, 6144) == (1.0, 0.0)


def test_distilled_sigmas_are_the_published_lists() -> None:
    assert (*DISTILLED_SIGMA_VALUES, 0.0) == DISTILLED_SIGMAS
    assert (*STAGE_2_DISTILLED_SIGMA_VALUES, 0.0) == REFINE_SIGMAS
    assert (len(DISTILLED_SIGMAS) - 1, len(REFINE_SIGMAS) - 1) == (8, 3)


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_a_number_of_steps_out_of_range_is_refused(num_steps: int) -> None:
    with pytest.raises(RowError, match=f"num_inference_steps is {num_steps}; expected 1 to 1000"):
        config().sigmas(num_steps, 4096)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"use_karras_sigmas": True}, "use_karras_sigmas is True: it is not supported"),
        ({"stochastic_sampling": True}, "stochastic_sampling is True: it is not supported"),
        ({"time_shift_type": "cubic"}, "time_shift_type is 'cubic': expected exponential or lin"),
        ({"_class_name": "DDIMScheduler"}, "_class_name is 'DDIMScheduler': expected Flow"),
        ({"base_shfit": 1.0}, 'base_shfit is 1.0: it is not an option. did you mean "base_shift"'),
        ({"shift": "3"}, "shift is '3': expected a number"),
        ({"shift_terminal": 1.0}, "shift_terminal is 1.0: expected a number from 0 up to 1"),
        ({"use_dynamic_shifting": 1}, "use_dynamic_shifting is 1: expected true or false"),
    ],
)
def test_schedules_that_cannot_be_run_are_refused(option: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        config(**option)


def test_steps_equal_diffusers_in_rows_of_different_lengths() -> None:
    """A row's latents are what diffusers' scheduler makes of them alone, and then stay."""
    schedules = [config().sigmas(5, 6144), config().sigmas(2, 1024), REFINE_SIGMAS]
    generator = torch.Generator().manual_seed(1)
    start, target = torch.randn(2, 3, 7, 4, generator=generator)
    steps = FlowMatchSteps(schedules, torch.device("cpu"))
    x, active = start, []
    while not steps.is_done:
        active.append(steps.rows)
        some = x[steps.row_index]
        clean = target[steps.row_index] * (1 + steps.sigmas.view(-1, 1, 1))
        x = x.index_copy(0, steps.row_index, steps.euler(some, clean))
        steps.advance()
    assert active == [(0, 1, 2), (0, 1, 2), (0, 2), (0,), (0,)]
    for row, schedule in enumerate(schedules):
        expected = start[row]
        reference = FlowMatchEulerDiscreteScheduler()
        reference.set_timesteps(sigmas=list(schedule[:-1]))
        for sigma, timestep in zip(schedule[:-1], reference.timesteps, strict=True):
            velocity = (expected - target[row] * (1 + sigma)) / sigma
            expected = reference.step(velocity, timestep, expected, return_dict=False)[0]
        torch.testing.assert_close(x[row], expected, rtol=1e-5, atol=1e-5)


def test_what_is_clean_stays_to_the_bit() -> None:
    steps = FlowMatchSteps([config().sigmas(3, 4096)], torch.device("cpu"))
    x = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(2))
    assert torch.equal(steps.euler(x, x), x)


def test_noise_is_added_as_the_schedule_has_it() -> None:
    latents, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3))
    noisy = add_noise(latents, noise, 0.909375)
    torch.testing.assert_close(noisy, 0.909375 * noise + 0.090625 * latents)
    assert torch.equal(add_noise(latents, noise, 1.0), noise)
