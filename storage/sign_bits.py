"""A predictor of one bit a weight: the signs of the up projection, and a scale for each neuron.

Axes: F d_ff, D d_model, W bytes of a packed row (D / 8, rounded up).

Replacing a row by its signs times the mean of its magnitudes is the best such approximation of the row (arXiv:1603.05279, 2). No text and
no training is needed for it; only the threshold is calibrated.
"""

import numpy as np


def packed_signs(
    up: np.ndarray,  # [F, D]
) -> np.ndarray:
    """[F, W] uint8: bit j of byte w is set where the weight j * W + w is positive."""
    d_ff, d_model = up.shape
    width = -(-d_model // 8)
    planes = np.zeros((d_ff, 8 * width), np.uint8)
    planes[:, :d_model] = up > 0
    bits = planes.reshape(d_ff, 8, width) << np.arange(8, dtype=np.uint8)[None, :, None]
    return np.bitwise_or.reduce(bits, axis=1)


def sign_scale(
    up: np.ndarray,  # [F, D]
) -> np.ndarray:
    """[F] float32: the mean magnitude of each neuron's weights."""
    return np.abs(up.astype(np.float32)).mean(axis=1)
