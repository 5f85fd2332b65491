import torch

from raydiff.diffusion.noise import draw, row_generators


def test_a_row_starts_as_the_contract_says():
    noise = draw(row_generators([7, 2**63 - 1]), (4, 8, 6))
    assert noise.dtype == torch.float32
    for row, seed in enumerate([7, 2**63 - 1]):
        generator = torch.Generator("cpu").manual_seed(seed)
        expected = torch.randn((1, 4, 8, 6), generator=generator, dtype=torch.float32)
        assert torch.equal(noise[row : row + 1], expected)


def test_later_draws_go_on_with_the_rows_generator():
    both, alone = row_generators([3, 4]), row_generators([4])
    draw(both, (4, 5, 5))
    draw(alone, (4, 5, 5))
    assert torch.equal(draw(both, (4, 5, 5))[1:], draw(alone, (4, 5, 5)))
    assert not torch.equal(draw(alone, (4, 5, 5)), draw(row_generators([4]), (4, 5, 5)))
