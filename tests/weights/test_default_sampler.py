import pytest

from raydiff.errors import ModelError
from raydiff.weights.resolve import default_sampler


@pytest.mark.parametrize(
    ("class_name", "sampler"),
    [
        ("DDIMScheduler", "ddim"),
        ("PNDMScheduler", "pndm"),
        ("EulerDiscreteScheduler", "euler"),
        ("EulerAncestralDiscreteScheduler", "euler_ancestral"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("HeunDiscreteScheduler", "heun"),
        ("LMSDiscreteScheduler", "lms"),
        ("UniPCMultistepScheduler", "unipc"),
        ("LCMScheduler", "lcm"),
    ],
)
def test_default_sampler(class_name, sampler):
    assert default_sampler({"_class_name": class_name}) == sampler


def test_default_sampler_of_the_sde_solver():
    config = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}
    assert default_sampler(config) == "dpmpp_2m_sde"


def test_an_unknown_scheduler_is_named_with_the_nearest():
    with pytest.raises(ModelError, match="'DDIMSheduler'; did you mean \"DDIMScheduler"):
        default_sampler({"_class_name": "DDIMSheduler"})
    with pytest.raises(ModelError, match="_class_name is 'None'"):
        default_sampler({})
