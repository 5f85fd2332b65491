import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from raydiff.diffusion.guidance import combine


def make_predictions(num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (num_rows, 4, 6, 5)
    negative = torch.randn(shape, generator=generator)
    return negative, negative * 0.3 + torch.randn(shape, generator=generator) + 0.2


def test_each_row_has_its_own_scale_and_rescale():
    negative, positive = make_predictions(4)
    scale, rescale = torch.tensor([7.5, 1.5, 12.0, 3.0]), torch.tensor([0.0, 0.3, 0.7, 1.0])
    guided = combine(negative, positive, scale, rescale)
    for row in range(4):
        one = slice(row, row + 1)
        expected = negative[one] + scale[row] * (positive[one] - negative[one])
        if rescale[row] > 0:
            expected = rescale_noise_cfg(expected, positive[one], float(rescale[row]))
        torch.testing.assert_close(guided[one], expected, rtol=1e-6, atol=1e-6)


def test_rescale_zero_leaves_the_guided_prediction_exactly():
    negative, positive = make_predictions(2)
    scale = torch.tensor([7.5, 2.0])
    guided = combine(negative, positive, scale, torch.tensor([0.0, 0.7]))
    assert torch.equal(guided[0], negative[0] + 7.5 * (positive[0] - negative[0]))
    assert not torch.equal(guided[1], negative[1] + 2.0 * (positive[1] - negative[1]))


def test_a_constant_prediction_without_rescale_stays_finite():
    negative, positive = torch.zeros(1, 4, 3, 3), torch.ones(1, 4, 3, 3)
    guided = combine(negative, positive, torch.tensor([5.0]), torch.tensor([0.0]))
    assert torch.equal(guided, torch.full((1, 4, 3, 3), 5.0))
