"""A predictor without training: the up projection's best low-rank approximation, with a threshold for a wanted recall.

Axes: F d_ff, D d_model, R rank, N random inputs.

The paper trains sigmoid(B(A h)) > 0.5; here B A is the truncated singular value decomposition of the up projection, found by random
projection, so the score is the pre-activation itself but for what the dropped directions add. What the FFN sees is a LayerNorm's
output, scale * z + bias with z of unit variance, so drawing z at random calibrates a threshold without any text.

References: arXiv:2312.11514, 3.1 (the predictor); arXiv:0909.4061 (randomised decomposition).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

RowBlocks = Callable[[], Iterator[np.ndarray]]
"""Yields the up projection's rows in order, blocks [n, D]; may be called again."""

WANTED_RECALL = 0.99
_OVERSAMPLE = 10
_POWER_ITERATIONS = 2  # one instead of two named 2.5 % more neurons on a planted matrix
_NUM_INPUTS = 256
_LARGEST = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankPredictor:
    """One layer: active where `second @ (first @ h) + bias > threshold`. float32, [R, D], [F, R], [F], [1]."""

    first: np.ndarray
    second: np.ndarray
    bias: np.ndarray
    threshold: np.ndarray


def default_rank(d_model: int, d_ff: int) -> int:
    """A rank whose predictor is at most 5 % of the layer's weights, a multiple of 8 (at least 1)."""
    layer_weights = 2 * d_model * d_ff + 4 * d_model * d_model
    rank = int(0.05 * layer_weights / (d_model + d_ff))
    return max(rank // 8 * 8, min(rank, 8), 1)


def low_rank_predictor(
    up_blocks: RowBlocks,
    up_bias: np.ndarray,  # [F] f32
    norm_scale: np.ndarray,  # [D] f32, of the LayerNorm before the FFN
    norm_bias: np.ndarray,  # [D] f32
    rank: int,
    seed: int,
) -> LowRankPredictor:
    """Approximates the up projection, weighted by how large each input is, and calibrates the threshold.

    The weights are read a few times and never all held in float32.
    """
    rng = np.random.default_rng(seed)
    d_model = len(norm_scale)
    up_bias, norm_scale, norm_bias = _finite(up_bias), _finite(norm_scale), _finite(norm_bias)
    deviation = np.sqrt(norm_scale.astype(np.float64) ** 2 + norm_bias.astype(np.float64) ** 2).astype(np.float32)
    weight = np.maximum(deviation, 1e-6 * max(float(deviation.max()), 1e-30))
    second, first = _truncated_svd(up_blocks, weight, min(rank, d_model), rng)

    inputs = norm_scale * rng.standard_normal((_NUM_INPUTS, d_model), np.float32) + norm_bias
    coordinates = inputs @ first.T  # [N, R]
    scores = coordinates @ second.T + up_bias  # [N, F]
    truth = np.concatenate([inputs @ _finite(block).T for block in up_blocks()], axis=1) + up_bias
    active = scores[truth > 0]
    threshold = float(np.quantile(active, 1 - WANTED_RECALL)) if active.size else np.inf
    return LowRankPredictor(
        first=first, second=second, bias=up_bias.astype(np.float32), threshold=np.asarray([threshold], np.float32)
    )


def _truncated_svd(
    up_blocks: RowBlocks, weight: np.ndarray, rank: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """`second` [F, R] and `first` [R, D] with second @ first close to the matrix W, errors counted as (W - approximation) * weight."""
    width = min(rank + _OVERSAMPLE, len(weight))
    basis = rng.standard_normal((len(weight), width), np.float32)
    for _ in range(_POWER_ITERATIONS):
        left = _orthonormal(_times(up_blocks, weight[:, None] * basis))
        basis, _ = np.linalg.qr(weight[:, None] * _transposed_times(up_blocks, left))
    product = _times(up_blocks, weight[:, None] * basis)  # [F, width]
    # The right singular vectors of a tall matrix are the eigenvectors of its small Gram matrix, largest last.
    _, right = np.linalg.eigh(product.T @ product)
    right = right[:, ::-1][:, :rank]
    return (product @ right).astype(np.float32), ((right.T @ basis.T) / weight).astype(np.float32)


def _orthonormal(columns: np.ndarray) -> np.ndarray:
    """Columns spanning the same space, orthonormal but for rounding; products only, where a QR of [F, R] would take seconds."""
    values, vectors = np.linalg.eigh(columns.T @ columns)
    floor = max(1e-12 * float(values[-1]), float(np.finfo(np.float32).tiny))  # directions, or whole layers, may be zero
    return columns @ (vectors / np.sqrt(np.maximum(values, np.float32(floor))))


def _times(up_blocks: RowBlocks, right: np.ndarray) -> np.ndarray:
    return np.concatenate([_finite(block) @ right for block in up_blocks()])


def _transposed_times(up_blocks: RowBlocks, left: np.ndarray) -> np.ndarray:
    total, start = 0.0, 0
    for block in up_blocks():
        total = total + _finite(block).T @ left[start : start + len(block)]
        start += len(block)
    return np.asarray(total)


def _finite(values: np.ndarray) -> np.ndarray:
    """In float32, zeros for what is NaN or so large that its square is no number.

    A damaged neuron, of which the converter warns, must not spoil its whole layer.
    """
    values = values.astype(np.float32)
    return np.where(np.abs(values) < _LARGEST, values, np.float32(0))
