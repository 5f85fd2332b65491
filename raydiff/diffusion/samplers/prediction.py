"""What a model's answer m says about the row, by prediction type: weights of x and m in x0, in the
noise, or in the derivative. `sigma` is the noise-to-signal ratio, `alpha` the signal's variance."""

import numpy as np

from raydiff.diffusion.schedule import PredictionType


def denoised_in_sigma(prediction_type: PredictionType, sigma: float) -> tuple[float, float]:
    """Return x0 where x = x0 + sigma * noise."""
    if prediction_type == "epsilon":
        return 1.0, -sigma
    if prediction_type == "v_prediction":
        return 1 / (sigma**2 + 1), -sigma / np.sqrt(sigma**2 + 1)
    return 0.0, 1.0


def derivative(prediction_type: PredictionType, sigma: float) -> tuple[float, float]:
    """Return dx/dsigma = (x - x0) / sigma where x = x0 + sigma * noise."""
    if prediction_type == "epsilon":
        return 0.0, 1.0
    if prediction_type == "v_prediction":
        return sigma / (sigma**2 + 1), 1 / np.sqrt(sigma**2 + 1)
    return 1 / sigma, -1 / sigma


def denoised(prediction_type: PredictionType, alpha: float) -> tuple[float, float]:
    """Return x0 where x = sqrt(alpha) * x0 + sqrt(1 - alpha) * noise."""
    signal, noise = np.sqrt(alpha), np.sqrt(1 - alpha)
    if prediction_type == "epsilon":
        return 1 / signal, -noise / signal
    if prediction_type == "v_prediction":
        return signal, -noise
    return 0.0, 1.0


def predicted_noise(prediction_type: PredictionType, alpha: float) -> tuple[float, float]:
    """Return the noise where x = sqrt(alpha) * x0 + sqrt(1 - alpha) * noise."""
    signal, noise = np.sqrt(alpha), np.sqrt(1 - alpha)
    if prediction_type == "epsilon":
        return 0.0, 1.0
    if prediction_type == "v_prediction":
        return noise, signal
    return 1 / noise, -signal / noise
