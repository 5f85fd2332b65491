"""What a batch of unlike rows must keep; tests/parity/test_samplers.py has that rows are right."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from raydiff.diffusion.denoise import DenoiseState, RowPlan, check_plan
from raydiff.diffusion.noise import draw, row_generators
from raydiff.diffusion.schedule import ScheduleConfig
from raydiff.errors import RowError
from raydiff.request import SAMPLERS, num_denoise_steps

SHAPE = (4, 5, 7)
SD = ScheduleConfig.from_dict(
    {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": True,
        "clip_sample_range": 1.5,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
)


def model(latents: Tensor, timesteps: Tensor) -> Tensor:
    """Mix the channels smoothly; each row by itself, so that batching cannot change it."""
    phase = torch.sin(timesteps * 0.01).view(-1, 1, 1, 1)
    return torch.tanh(latents.roll(1, dims=1) * 0.6 - latents * 0.2 + phase) + 0.5 * latents


def start(plans: list[RowPlan], seeds: list[int]) -> DenoiseState:
    generators = row_generators(seeds)
    init_latents = [
        None if plan.strength is None else draw(row_generators([seed + 1000]), SHAPE)
        for plan, seed in zip(plans, seeds, strict=True)
    ]
    return DenoiseState.start(
        plans,
        SD,
        noise=draw(generators, SHAPE),
        generators=generators,
        init_latents=init_latents,
    )


def finish(state: DenoiseState) -> Tensor:
    while not state.is_done:
        latents, timesteps, _ = state.model_input()
        state.step(model(latents, timesteps))
    return state.latents


MIXED = [
    RowPlan(
        sampler=sampler,
        num_inference_steps=3 + 2 * index,
        strength=0.6 if index % 3 == 1 else None,
        eta=0.5 if sampler == "ddim" else 0.0,
    )
    for index, sampler in enumerate(SAMPLERS)
]


def test_all_samplers_in_one_batch_equal_each_alone_exactly():
    seeds = [11 * index for index in range(len(MIXED))]
    together = finish(start(MIXED, seeds))
    assert torch.isfinite(together).all()
    for row, (plan, seed) in enumerate(zip(MIXED, seeds, strict=True)):
        alone = finish(start([plan], [seed]))
        assert torch.equal(together[row : row + 1], alone), plan


def test_the_order_of_the_rows_changes_nothing():
    seeds = list(range(len(MIXED)))
    forwards = finish(start(MIXED, seeds))
    backwards = finish(start(MIXED[::-1], seeds[::-1]))
    assert torch.equal(forwards, backwards.flip(0))


def test_rows_leave_when_they_are_done_and_stay_as_they_were():
    plans = [
        RowPlan(sampler=name, num_inference_steps=n) for name, n in (("euler", 2), ("heun", 3))
    ]
    state = start(plans, [1, 2])
    seen = []
    while not state.is_done:
        latents, timesteps, rows = state.model_input()
        assert latents.shape[0] == timesteps.shape[0] == len(rows)
        assert state.model_input()[2] is rows
        seen.append(rows)
        state.step(model(latents, timesteps))
        if len(seen) == 2:
            finished = state.latents[0].clone()
    # heun evaluates twice a step but the last
    assert seen == [(0, 1), (0, 1), (1,), (1,), (1,)]
    assert torch.equal(state.latents[0], finished)


def test_model_input_is_float32_and_the_answer_may_be_less():
    state = start([RowPlan(sampler="unipc", num_inference_steps=4)], [0])
    while not state.is_done:
        latents, timesteps, _ = state.model_input()
        assert latents.dtype == timesteps.dtype == torch.float32
        state.step(model(latents, timesteps).bfloat16())
    assert state.latents.dtype == torch.float32


def test_an_answer_that_is_overwritten_later_does_no_harm():
    """A CUDA graph returns the same memory at every call."""
    for plan in MIXED:
        state, answer = start([plan], [3]), torch.empty(1, *SHAPE)
        while not state.is_done:
            latents, timesteps, _ = state.model_input()
            answer.copy_(model(latents, timesteps))
            state.step(answer)
        assert torch.equal(state.latents, finish(start([plan], [3])))


class NoHostSync(TorchDispatchMode):
    """Fails on operations that would make the host wait for a GPU."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "item")

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        self.seen.add(name)
        if name in ("index", "index_put", "index_put_"):
            indices = [index for index in args[1] if index is not None]
            assert all(index.dtype != torch.bool for index in indices), "boolean indexing"
        assert name not in self.WAITS, name
        return func(*args, **(kwargs or {}))


def test_no_step_reads_a_value_back():
    state = start(MIXED, list(range(len(MIXED))))
    mode = NoHostSync()
    while not state.is_done:
        with mode:
            latents, timesteps, _ = state.model_input()
        answer = model(latents, timesteps)
        with mode:
            state.step(answer)
    assert {"index_select", "index_copy", "mul", "addcmul", "clamp"} <= mode.seen
    with pytest.raises(AssertionError, match="_local_scalar_dense"), mode:
        state.latents.sum().item()


@pytest.mark.parametrize(
    ("num_steps", "strength", "expected"),
    [(30, 1.0, 30), (30, 0.5, 15), (30, 0.04, 1), (30, 0.03, 0), (1, 0.99, 0), (50, 0.58, 28)],
)
def test_num_denoise_steps(num_steps, strength, expected):
    assert num_denoise_steps(num_steps, strength) == expected


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (RowPlan(sampler="eular", num_inference_steps=4), 'did you mean "euler"'),
        (RowPlan(sampler="euler", num_inference_steps=0), "takes 1 to 1000"),
        (RowPlan(sampler="euler", num_inference_steps=1001), "takes 1 to 1000"),
        (
            RowPlan(sampler="euler", num_inference_steps=20, strength=0.04),
            "leaves none of 20 steps. Use 0.05 or more",
        ),
        (RowPlan(sampler="euler", num_inference_steps=20, strength=0.0), "Use 0.05 or more"),
        (RowPlan(sampler="lcm", num_inference_steps=51), "at most 50"),
        (RowPlan(sampler="ddim", num_inference_steps=1000), "first timestep is 1000"),
        (RowPlan(sampler="dpmpp_2m", num_inference_steps=1000), "cannot be computed"),
        (RowPlan(sampler="unipc", num_inference_steps=1000), "cannot be computed"),
    ],
)
def test_a_plan_that_cannot_be_run_is_a_row_error(plan, message):
    with pytest.raises(RowError, match=message):
        check_plan(plan, SD)
    with pytest.raises(RowError, match=message):
        start([RowPlan(sampler="euler", num_inference_steps=2), plan], [0, 1])


@pytest.mark.parametrize("sampler", ["pndm", "euler_ancestral"])
def test_a_checkpoint_that_predicts_the_sample_needs_another_sampler(sampler):
    config = ScheduleConfig.from_dict({"prediction_type": "sample"})
    with pytest.raises(RowError, match="prediction_type is sample: use one of ddim"):
        check_plan(RowPlan(sampler=sampler, num_inference_steps=4), config)


def test_noise_prediction_from_pure_noise_is_a_row_error():
    config = ScheduleConfig.from_dict(
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    )
    with pytest.raises(RowError, match="cannot be computed"):
        check_plan(RowPlan(sampler="ddim", num_inference_steps=4), config)


def test_every_sampler_runs_up_to_its_largest_number_of_steps():
    for sampler in SAMPLERS:
        largest = 50 if sampler == "lcm" else 998
        check_plan(RowPlan(sampler=sampler, num_inference_steps=largest), SD)
