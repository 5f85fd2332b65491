"""Largest difference, PSNR and SSIM against scikit-image and values worked out by hand."""

import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from raydiff.output.similarity import LUMA, FrameComparison, mean_ssim


def images(height: int, width: int, noise: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(height * width + noise)
    left = random.integers(0, 256, (height, width, 3))
    left[: height // 2] = 200  # a flat half, where SSIM's variances are near nothing
    right = np.clip(left + random.integers(-noise, noise + 1, left.shape), 0, 255)
    return left.astype(np.uint8), right.astype(np.uint8)


def compare(left: np.ndarray, right: np.ndarray):
    frames = FrameComparison()
    frames.add(left, right)
    return frames.result()


@pytest.mark.parametrize("size", [(11, 11), (12, 40), (43, 64), (75, 31), (256, 192)])
@pytest.mark.parametrize("noise", [1, 40])
def test_equal_to_scikit_image(size: tuple[int, int], noise: int) -> None:
    left, right = images(*size, noise)
    found = compare(left, right)
    expected = structural_similarity(
        left @ LUMA,
        right @ LUMA,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
    )
    assert found.ssim == pytest.approx(expected, abs=1e-9)
    assert found.psnr == pytest.approx(peak_signal_noise_ratio(left, right, data_range=255))
    assert found.max_abs == np.abs(left.astype(int) - right).max()


def test_values_worked_out_by_hand() -> None:
    black = np.zeros((16, 16, 3), np.uint8)
    white = np.full((16, 16, 3), 255, np.uint8)
    found = compare(black, white)
    assert (found.max_abs, found.psnr) == (255, 0.0)
    # Flat images: the structure term is 1, the luminance term C1 / (255^2 + C1).
    assert found.ssim == pytest.approx(6.5025 / (65025 + 6.5025))
    one_level = white.copy()
    one_level[3, 5, 1] = 254
    found = compare(white, one_level)
    assert found.max_abs == 1
    assert found.psnr == pytest.approx(10 * math.log10(65025 * 768))


def test_equal_pixels() -> None:
    left, _ = images(20, 30, 5)
    found = compare(left, left.copy())
    assert found.is_equal
    assert (found.psnr, found.ssim) == (math.inf, 1.0)


def test_an_image_smaller_than_the_window_has_no_ssim() -> None:
    left, right = images(10, 64, 5)
    assert mean_ssim(left, right) is None
    assert compare(left, right).ssim is None
    assert compare(left, right).psnr < 60


def test_frames_add_up() -> None:
    pairs = [images(16, 24, noise) for noise in (2, 30)]
    frames = FrameComparison()
    for pair in pairs:
        frames.add(*pair)
    found, each = frames.result(), [compare(*pair) for pair in pairs]
    assert found.max_abs == max(one.max_abs for one in each)
    assert found.ssim == pytest.approx(sum(one.ssim for one in each) / 2)
    squared = [255**2 / 10 ** (one.psnr / 10) for one in each]
    assert found.psnr == pytest.approx(10 * math.log10(255**2 / (sum(squared) / 2)))
