"""Noise schedules: a checkpoint's scheduler_config.json, read as diffusers reads it, and the
timesteps and sigmas that follow from it. Computed on the host, once per kind of row."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from raydiff.errors import ModelError, RowError

FloatArray = NDArray[np.float64]
PredictionType = Literal["epsilon", "v_prediction", "sample"]

KARRAS_RHO = 7.0
"""Karras et al. 2022, table 1."""

ZERO_SNR_ALPHA = 2.0**-24
"""Stands for alphas_cumprod = 0 where sigma would be infinite (diffusers; sigma is then 4096)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """The schedule of one checkpoint as one sampler sees it."""

    num_train_timesteps: int = 1000
    beta_schedule: Literal["linear", "scaled_linear"] = "linear"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    trained_betas: tuple[float, ...] = ()
    """Betas given one by one, instead of the three fields above."""
    rescale_betas_zero_snr: bool = False
    prediction_type: PredictionType = "epsilon"
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "linspace"
    steps_offset: int = 0
    """Added to the timesteps of `leading` spacing."""
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    set_alpha_to_one: bool = True
    """Whether DDIM and PNDM end at alpha 1 or at the alpha of timestep 0."""
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    solver_type: Literal["midpoint", "heun", "logrho", "bh1", "bh2"] = "midpoint"
    """`heun` matters to DPM-Solver++, `bh1` to UniPC; all others are their usual form."""
    lower_order_final: bool = True
    euler_at_final: bool = False
    original_inference_steps: int = 50
    """LCM: steps of the schedule that the checkpoint was distilled on."""
    timestep_scaling: float = 10.0
    """LCM: scales the timestep in its boundary condition."""


_SAMPLER_DEFAULTS: dict[str, dict[str, Any]] = {
    "ddim": {"timestep_spacing": "leading", "clip_sample": True},
    "pndm": {"timestep_spacing": "leading", "set_alpha_to_one": False},
    "heun": {"beta_start": 0.00085, "beta_end": 0.012},
    "unipc": {"solver_type": "bh2"},
    "lcm": {
        "timestep_spacing": "leading",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
}
"""Where the constructor of a sampler's diffusers class differs from the defaults of Schedule."""

_SAMPLER_IGNORES: dict[str, frozenset[str]] = {
    "euler_ancestral": frozenset(
        {"use_karras_sigmas", "use_exponential_sigmas", "final_sigmas_type"}
    ),
    "heun": frozenset({"rescale_betas_zero_snr", "final_sigmas_type"}),
    "lms": frozenset({"rescale_betas_zero_snr", "final_sigmas_type"}),
    "pndm": frozenset({"rescale_betas_zero_snr"}),
}
"""Keys that a sampler's diffusers class does not have: it renders as if they were absent."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "beta_schedule": ("linear", "scaled_linear"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
}

_MUST_BE_OFF = (
    "disable_corrector",
    "sigma_max",
    "sigma_min",
    "thresholding",
    "use_beta_sigmas",
    "use_dynamic_shifting",
    "use_flow_sigmas",
    "use_lu_lambdas",
)
"""Keys that would change the images and that no sampler here implements."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """A checkpoint's scheduler_config.json, checked. Hashable: tables are cached by it."""

    given: tuple[tuple[str, Any], ...] = ()
    """The keys that the file has and that a Schedule knows, in its order."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ScheduleConfig":
        """Read scheduler_config.json; raises ModelError for a schedule that cannot be rendered."""
        given = {key: value for key, value in config.items() if value is not None}
        for key in _MUST_BE_OFF:
            if given.get(key):
                raise _error(key, given[key], "it is not supported; it must be off or absent")
        if given.get("predict_x0") is False:
            raise _error("predict_x0", False, "only true is supported")
        if given.get("lambda_min_clipped", -math.inf) != -math.inf:
            raise _error("lambda_min_clipped", given["lambda_min_clipped"], "it must be -inf")
        if given.get("use_karras_sigmas") and given.get("use_exponential_sigmas"):
            raise _error("use_karras_sigmas", True, "use_exponential_sigmas is true as well")
        for key, choices in _CHOICES.items():
            if key in given and given[key] not in choices:
                raise _error(key, given[key], f"expected one of: {', '.join(choices)}")
        known = [field.name for field in fields(Schedule) if field.name in given]
        return cls(given=tuple((key, _checked(key, given[key])) for key in known))

    def for_sampler(self, sampler: str) -> Schedule:
        """Return the schedule that `sampler` runs: what the file lacks is the sampler's default.

        The rule of diffusers' `XScheduler.from_config(pipe.scheduler.config)`.
        """
        ignored = _SAMPLER_IGNORES.get(sampler, frozenset())
        given = {key: value for key, value in self.given if key not in ignored}
        return Schedule(**{**_SAMPLER_DEFAULTS.get(sampler, {}), **given})


@lru_cache(maxsize=64)
def alphas_cumprod(schedule: Schedule) -> FloatArray:
    """Return the (num_train_timesteps,) signal share of each timestep's variance.

    Float32 values: torch's own linspace and cumprod, so that they are the reference's to the bit.
    """
    if schedule.trained_betas:
        betas = torch.tensor(schedule.trained_betas, dtype=torch.float32)
    else:
        power = 0.5 if schedule.beta_schedule == "scaled_linear" else 1
        start, end = schedule.beta_start**power, schedule.beta_end**power
        betas = torch.linspace(start, end, schedule.num_train_timesteps, dtype=torch.float32)
        if schedule.beta_schedule == "scaled_linear":
            betas = betas**2
    if schedule.rescale_betas_zero_snr:
        betas = _zero_terminal_snr(betas)
    return cast(FloatArray, torch.cumprod(1.0 - betas, dim=0).double().numpy())


@lru_cache(maxsize=64)
def train_sigmas(schedule: Schedule) -> NDArray[np.float32]:
    """Return the (num_train_timesteps,) noise-to-signal ratio of each timestep, rising."""
    alphas = torch.from_numpy(alphas_cumprod(schedule)).float()
    if schedule.rescale_betas_zero_snr:
        alphas[-1] = ZERO_SNR_ALPHA
    # A power, for the reference's last bit: torch rounds sqrt differently.
    return cast(NDArray[np.float32], (((1 - alphas) / alphas) ** 0.5).numpy())


def spaced_timesteps(
    schedule: Schedule, num_steps: int, *, num_points: int | None = None
) -> FloatArray:
    """Return `num_steps` falling timesteps of the configured spacing, not yet rounded.

    `num_points` is num_steps + 1 where a solver leaves out the last of them (all but `trailing`).
    """
    rising: FloatArray
    points = num_points or num_steps
    last = schedule.num_train_timesteps
    if schedule.timestep_spacing == "linspace":
        rising = np.linspace(0, last - 1, points)
    elif schedule.timestep_spacing == "leading":
        rising = np.arange(points, dtype=np.float64) * (last // points) + schedule.steps_offset
    else:
        # diffusers' arange may end in one more timestep, -1, by a rounding error; it is not a step.
        rising = np.arange(last, 0, -last / num_steps)[:num_steps][::-1].round() - 1
    return rising[::-1][:num_steps]


def whole_timesteps(schedule: Schedule, num_steps: int) -> NDArray[np.int64]:
    """Return the timesteps (N,) of the samplers that step in alpha, DDIM and PNDM."""
    timesteps = spaced_timesteps(schedule, num_steps).round().astype(np.int64)
    if timesteps[0] >= schedule.num_train_timesteps:
        raise RowError(
            f"num_inference_steps is {num_steps}: with steps_offset {schedule.steps_offset} the "
            f"first timestep is {timesteps[0]}; the checkpoint's last is "
            f"{schedule.num_train_timesteps - 1}. Use fewer steps."
        )
    return timesteps


def sigma_steps(schedule: Schedule, num_steps: int) -> tuple[FloatArray, FloatArray]:
    """Return timesteps (N,) and sigmas (N + 1,) of the samplers that step in sigma."""
    timesteps = spaced_timesteps(schedule, num_steps).astype(np.float32).astype(np.float64)
    sigmas = _interpolate(schedule, timesteps)
    if schedule.use_karras_sigmas or schedule.use_exponential_sigmas:
        sigmas = _respaced(schedule, sigmas[0], sigmas[-1], num_steps)
        timesteps = _timesteps_of(schedule, sigmas)
    return timesteps, _with_final(schedule, sigmas)


def solver_steps(schedule: Schedule, num_steps: int) -> tuple[FloatArray, FloatArray]:
    """Return timesteps (N,), whole numbers, and sigmas (N + 1,) of DPM-Solver++ and UniPC."""
    timesteps = spaced_timesteps(schedule, num_steps, num_points=num_steps + 1).round()
    sigmas = _interpolate(schedule, timesteps)
    if schedule.use_karras_sigmas or schedule.use_exponential_sigmas:
        whole_range = train_sigmas(schedule)
        sigmas = _respaced(schedule, float(whole_range[-1]), float(whole_range[0]), num_steps)
        timesteps = _timesteps_of(schedule, sigmas)
        # As the reference: rounded for karras, cut off for exponential.
        timesteps = timesteps.round() if schedule.use_karras_sigmas else np.trunc(timesteps)
    return timesteps, _with_final(schedule, sigmas)


def _interpolate(schedule: Schedule, timesteps: FloatArray) -> FloatArray:
    table = train_sigmas(schedule)
    return cast(FloatArray, np.interp(timesteps, np.arange(len(table)), table))


def _respaced(schedule: Schedule, largest: float, smallest: float, num_steps: int) -> FloatArray:
    """Return `num_steps` falling sigmas on the Karras or the exponential curve."""
    if schedule.use_exponential_sigmas:
        return np.exp(np.linspace(math.log(largest), math.log(smallest), num_steps))
    low, high = smallest ** (1 / KARRAS_RHO), largest ** (1 / KARRAS_RHO)
    return cast(FloatArray, (high + np.linspace(0, 1, num_steps) * (low - high)) ** KARRAS_RHO)


def _timesteps_of(schedule: Schedule, sigmas: FloatArray) -> FloatArray:
    """Return the fractional timestep of each sigma, linear in log sigma.

    The gaps between the table's logs are float32, as the reference's: its timesteps to the bit.
    """
    table = np.log(train_sigmas(schedule))
    log_sigmas = np.log(np.maximum(sigmas, 1e-10))
    low = np.clip(np.searchsorted(table, log_sigmas, side="right") - 1, 0, len(table) - 2)
    above = np.clip((table[low] - log_sigmas) / (table[low] - table[low + 1]), 0, 1)
    return cast(FloatArray, (1 - above) * low + above * (low + 1))


def _with_final(schedule: Schedule, sigmas: FloatArray) -> FloatArray:
    """Append where the last step goes; round to float32, as the reference keeps its sigmas."""
    final = float(train_sigmas(schedule)[0]) if schedule.final_sigmas_type == "sigma_min" else 0.0
    return np.append(sigmas, final).astype(np.float32).astype(np.float64)


def _zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Shift and scale so that the last timestep is pure noise (arXiv 2305.08891, algorithm 1)."""
    roots = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    cumulative = ((roots - last) * (first / (first - last))) ** 2
    return 1.0 - torch.cat([cumulative[:1], cumulative[1:] / cumulative[:-1]])


def _checked(key: str, value: Any) -> Any:
    """Return the value of a known key, or raise when it is not of the key's type."""
    default = getattr(Schedule(), key)
    if key == "trained_betas":
        if not isinstance(value, list) or not all(isinstance(beta, float) for beta in value):
            raise _error(key, value, "expected a list of numbers")
        return tuple(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise _error(key, value, f"expected a {type(default).__name__}")
    return value


def _error(key: str, value: object, rule: str) -> ModelError:
    return ModelError(f"scheduler_config.json: {key} is {value!r}: {rule}")
