"""The samplers, one file per family: each turns a schedule and a number of steps into a Trajectory.

`first_step` is None for txt2img; for img2img it is the step that the init image enters at.
"""

from collections.abc import Callable
from functools import partial

from raydiff.diffusion.samplers.ddim import ddim
from raydiff.diffusion.samplers.dpmpp import dpmpp_2m, dpmpp_2m_sde
from raydiff.diffusion.samplers.euler import euler, euler_ancestral
from raydiff.diffusion.samplers.heun import heun
from raydiff.diffusion.samplers.lcm import lcm
from raydiff.diffusion.samplers.lms import lms
from raydiff.diffusion.samplers.pndm import pndm
from raydiff.diffusion.samplers.unipc import unipc
from raydiff.diffusion.schedule import Schedule
from raydiff.diffusion.trajectory import Trajectory
from raydiff.errors import RowError, nearest

Sampler = Callable[[Schedule, int, int | None], Trajectory]

_SAMPLERS: dict[str, Sampler] = {
    "ddim": partial(ddim, eta=0.0),
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "heun": heun,
    "lms": lms,
    "pndm": pndm,
    "unipc": unipc,
    "lcm": lcm,
}

_NO_SAMPLE_PREDICTION = ("euler_ancestral", "pndm")
"""Not defined by the reference for checkpoints that predict x0 itself."""


def get_sampler(name: str, schedule: Schedule, *, eta: float) -> Sampler:
    """Return the sampler of that name; raises RowError when it cannot run the checkpoint."""
    if name not in _SAMPLERS:
        known = ", ".join(_SAMPLERS)
        raise RowError(f"sampler is {name!r}; {nearest(name, _SAMPLERS)}known: {known}")
    if schedule.prediction_type == "sample" and name in _NO_SAMPLE_PREDICTION:
        others = ", ".join(other for other in _SAMPLERS if other not in _NO_SAMPLE_PREDICTION)
        raise RowError(
            f"sampler is {name!r}; the checkpoint's prediction_type is sample: use one of {others}"
        )
    if name == "ddim":
        return partial(ddim, eta=eta)
    return _SAMPLERS[name]
