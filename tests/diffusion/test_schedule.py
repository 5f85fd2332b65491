import json
import math

import pytest

from raydiff.diffusion.schedule import ScheduleConfig, spaced_timesteps
from raydiff.errors import ModelError
from raydiff.request import SAMPLERS

SD21 = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.8.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def test_keys_of_the_file_hold_for_every_sampler():
    config = ScheduleConfig.from_dict(json.loads(json.dumps(SD21)))
    for sampler in SAMPLERS:
        schedule = config.for_sampler(sampler)
        assert schedule.prediction_type == "v_prediction"
        assert (schedule.beta_start, schedule.beta_end) == (0.00085, 0.012)
        assert schedule.steps_offset == 1


def test_missing_keys_are_the_samplers_own():
    config = ScheduleConfig.from_dict(SD21)
    assert config.for_sampler("ddim").timestep_spacing == "leading"
    assert config.for_sampler("euler").timestep_spacing == "linspace"
    assert ScheduleConfig.from_dict({}).for_sampler("ddim").clip_sample
    assert not ScheduleConfig.from_dict({}).for_sampler("lcm").clip_sample


def test_integers_where_numbers_are_meant_and_null_where_nothing_is():
    config = ScheduleConfig.from_dict(
        {"beta_end": 1, "use_karras_sigmas": None, "lambda_min_clipped": -math.inf}
    )
    schedule = config.for_sampler("euler")
    assert schedule.beta_end == 1.0
    assert not schedule.use_karras_sigmas


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prediction_type", "flow_prediction"),
        ("beta_schedule", "squaredcos_cap_v2"),
        ("timestep_spacing", "middle"),
        ("final_sigmas_type", 3),
        ("interpolation_type", "log_linear"),
        ("timestep_type", "continuous"),
        ("thresholding", True),
        ("use_beta_sigmas", True),
        ("use_flow_sigmas", True),
        ("use_lu_lambdas", True),
        ("sigma_min", 0.002),
        ("predict_x0", False),
        ("disable_corrector", [0]),
        ("lambda_min_clipped", -5.1),
        ("num_train_timesteps", 1000.5),
        ("steps_offset", True),
        ("beta_start", "0.1"),
        ("trained_betas", 0.1),
        ("trained_betas", ["0.1"]),
        ("clip_sample", "no"),
    ],
)
def test_a_schedule_that_would_render_something_else_is_refused(key, value):
    with pytest.raises(ModelError, match=f"scheduler_config.json: {key} is "):
        ScheduleConfig.from_dict({**SD21, key: value})


def test_two_sigma_curves_are_refused():
    both = {"use_karras_sigmas": True, "use_exponential_sigmas": True}
    with pytest.raises(ModelError, match="use_exponential_sigmas is true as well"):
        ScheduleConfig.from_dict(both)


@pytest.mark.parametrize("num_steps", [61, 103, 998])
def test_trailing_spacing_has_no_step_below_zero(num_steps):
    """np.arange gives one timestep too many here, by a rounding error."""
    config = ScheduleConfig.from_dict({**SD21, "timestep_spacing": "trailing"})
    timesteps = spaced_timesteps(config.for_sampler("euler"), num_steps)
    assert len(timesteps) == num_steps
    assert timesteps[0] == 999
    assert timesteps[-1] >= 0
