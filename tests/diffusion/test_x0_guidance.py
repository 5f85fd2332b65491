"""LTX-2's guidance: which passes a row needs, and how their predictions are put together."""

import pytest
import torch
from diffusers.pipelines.ltx2.pipeline_ltx2 import rescale_noise_cfg

from raydiff.diffusion.x0_guidance import Weaker, guide
from raydiff.video_settings import RowGuidance, StreamGuidance

FULL = StreamGuidance(guidance_scale=3.0, stg_scale=1.0, modality_scale=3.0, guidance_rescale=0.7)
NONE = StreamGuidance()


def predictions(*, num_rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    kinds = ("positive", "negative", "perturbed", "isolated")
    return {kind: torch.randn(num_rows, 6, 5, generator=generator) + 0.3 for kind in kinds}


@pytest.mark.parametrize(
    ("video", "audio", "passes"),
    [
        (NONE, NONE, ("positive",)),
        (FULL, FULL, ("negative", "positive", "perturbed", "isolated")),
        (NONE, FULL, ("negative", "positive", "perturbed", "isolated")),
        (StreamGuidance(guidance_scale=4.0), NONE, ("negative", "positive")),
        (NONE, StreamGuidance(guidance_scale=7.0), ("negative", "positive")),
        (StreamGuidance(stg_scale=0.5), NONE, ("positive", "perturbed")),
        (NONE, StreamGuidance(modality_scale=1.5), ("positive", "isolated")),
        (StreamGuidance(guidance_scale=0.5, guidance_rescale=0.7), NONE, ("positive",)),
    ],
)
def test_passes_that_no_stream_needs_are_not_run(
    video: StreamGuidance, audio: StreamGuidance, passes: tuple[str, ...]
) -> None:
    guidance = RowGuidance(video=video, audio=audio, stg_blocks=(29,))
    assert guidance.passes == passes
    assert guidance.num_evaluations(40) == 40 * len(passes)


def test_guidance_moves_away_from_each_weaker_prediction_of_x0() -> None:
    """c + (cfg - 1)(c - u) + stg (c - p) + (mod - 1)(c - m), then rescaled, each row as its own."""
    x0 = predictions(num_rows=3)
    rows = [
        FULL,
        StreamGuidance(guidance_scale=7.0, stg_scale=0.4, modality_scale=1.5),
        StreamGuidance(stg_scale=2.0, guidance_rescale=1.0),
    ]
    has_pass = {"negative": [0, 1], "perturbed": [0, 1, 2], "isolated": [0, 1]}
    weaker = [
        Weaker(
            torch.tensor(some),
            x0[kind][some],
            torch.tensor([rows[row].weight(kind) for row in some]),
        )
        for kind, some in has_pass.items()
    ]
    guided = guide(x0["positive"], weaker, torch.tensor([row.guidance_rescale for row in rows]))
    for row, scales in enumerate(rows):
        c, u, p, m = (x0[kind][row : row + 1] for kind in x0)
        expected = c + scales.stg_scale * (c - p)
        if row < 2:
            expected = expected + (scales.guidance_scale - 1) * (c - u)
            expected = expected + (scales.modality_scale - 1) * (c - m)
        if scales.guidance_rescale > 0:
            expected = rescale_noise_cfg(expected, c, scales.guidance_rescale)
        torch.testing.assert_close(guided[row : row + 1], expected, rtol=1e-5, atol=1e-5)


def test_guiding_x0_is_not_guiding_the_velocity_once_it_is_rescaled() -> None:
    x0, sigma = predictions(num_rows=1), 0.6
    x = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(5))

    def guided(values: dict[str, torch.Tensor], rescale: float) -> torch.Tensor:
        weaker = Weaker(torch.tensor([0]), values["negative"], torch.tensor([2.0]))
        return guide(values["positive"], [weaker], torch.tensor([rescale]))

    velocities = {kind: (x - value) / sigma for kind, value in x0.items()}
    plain = x - sigma * guided(velocities, 0.0)
    torch.testing.assert_close(guided(x0, 0.0), plain, rtol=1e-4, atol=1e-5)
    assert (guided(x0, 0.7) - (x - sigma * guided(velocities, 0.7))).abs().max() > 0.1


def test_a_row_without_other_passes_keeps_its_prediction_to_the_bit() -> None:
    x0 = predictions(num_rows=2)
    weaker = Weaker(torch.tensor([1]), x0["negative"][1:], torch.tensor([2.0]))
    guided = guide(x0["positive"], [weaker], torch.tensor([0.0, 0.7]))
    assert torch.equal(guided[0], x0["positive"][0])
    assert not torch.equal(guided[1], x0["positive"][1])
    assert guide(x0["positive"], [], torch.tensor([0.7, 0.7])) is x0["positive"]
