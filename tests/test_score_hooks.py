"""The built-in scoring hooks against what is known of the pixels."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from raydiff.score_hooks import brightness, contrast, sharpness


def test_brightness_is_the_mean_luma() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 24, 3), dtype=np.uint8)
    grey = np.asarray(Image.fromarray(pixels).convert("L"), dtype=float)
    assert brightness(pixels, {}) == pytest.approx(grey.mean(), abs=0.6)
    assert brightness(np.full((2, 2, 3), 255, np.uint8), {}) == pytest.approx(255)


def test_a_blurred_image_is_less_sharp() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (40, 24, 3), dtype=np.uint8)
    blurred = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(1)))
    sharp, soft = sharpness(pixels, {}), sharpness(blurred, {})
    assert sharp is not None
    assert soft is not None
    assert sharp > 10 * soft > 0
    ramp = np.arange(30, dtype=np.uint8)[:, None, None] * np.ones((1, 20, 3), np.uint8)
    assert sharpness(ramp, {}) == pytest.approx(0, abs=1e-9)
    assert sharpness(pixels[:2], {}) is None


def test_a_clip_of_equal_frames_scores_as_its_frame() -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    clip = np.stack([pixels] * 3)  # (F, H, W, 3)
    assert brightness(clip, {}) == pytest.approx(brightness(pixels, {}))
    assert sharpness(clip, {}) == pytest.approx(sharpness(pixels, {}))
    assert sharpness(clip[:, :2], {}) is None
    assert contrast(clip, {}) == pytest.approx(contrast(pixels, {}))


def test_contrast_counts_clipped_pixels() -> None:
    pixels = np.full((4, 4, 3), 100, np.uint8)
    pixels[0], pixels[1, 0] = 255, 0
    found = contrast(pixels, {})
    assert found["clipped"] == pytest.approx(5 / 16)
    assert found["rms"] > 0
