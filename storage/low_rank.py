"""Low-rank copies of the up projection: a predictor without training, and where training begins.

Axes: F d_ff, D d_model, R rank, N random inputs.

The paper trains sigmoid(B(A h)) > 0.5; here B A is the truncated singular value decomposition of the up projection W, found by random
projection, so the score is the pre-activation itself but for what the dropped directions add. Errors are weighted by how the inputs
vary: W L is decomposed, where L L^T is the inputs' covariance. Where there is no text at hand, `low_rank_predictor` takes what a
LayerNorm makes of independent inputs of unit variance, scale * z + bias, for the covariance and for calibrating the threshold.

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
_SMALLEST = float(np.finfo(np.float32).tiny)
_NEVER = float(np.finfo(np.float32).max)  # finite, so that it is a number in JSON, too


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
    up_bias, norm_scale, norm_bias = _finite(up_bias), _finite(norm_scale), _finite(norm_bias)
    deviation = np.sqrt(norm_scale.astype(np.float64) ** 2 + norm_bias.astype(np.float64) ** 2).astype(np.float32)
    weight = np.maximum(deviation, 1e-6 * max(float(deviation.max()), 1e-30))
    second, first = _truncated_svd(up_blocks, _Diagonal(weight), min(rank, len(norm_scale)), rng)

    inputs = norm_scale * rng.standard_normal((_NUM_INPUTS, len(norm_scale)), np.float32) + norm_bias
    coordinates = inputs @ first.T  # [N, R]
    scores = coordinates @ second.T + up_bias  # [N, F]
    truth = np.concatenate([inputs @ _finite(block).T for block in up_blocks()], axis=1) + up_bias
    threshold = recall_threshold(scores[truth > 0], WANTED_RECALL)
    return LowRankPredictor(
        first=first, second=second, bias=up_bias.astype(np.float32), threshold=np.asarray([threshold], np.float32)
    )


def weighted_low_rank(
    up_blocks: RowBlocks,
    up_bias: np.ndarray,  # [F] f32
    mean: np.ndarray,  # [D] f32, of the inputs
    covariance: np.ndarray,  # [D, D] f32, of the inputs
    rank: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The copy that errs least on inputs of this mean and covariance: `first` [R, D], `second` [F, R] and `bias` [F], f32.

    Coordinates `first @ (h - mean)` have unit variance and are uncorrelated; the bias makes up for the mean, so that scores are
    `second @ (first @ h) + bias`. Directions are in the order of what they explain, so the matrices of a smaller rank are a cut of those
    of a larger one; its bias is `bias + cut_second @ (cut_first @ mean)` with the rows and columns that are cut off.
    """
    size = len(mean)
    factor = _cholesky(covariance.astype(np.float64))
    second, first = _truncated_svd(up_blocks, _Lower(factor), min(rank, size), np.random.default_rng(seed))
    at_mean = np.concatenate([_finite(block) @ mean for block in up_blocks()])
    return first, second, _finite(up_bias) + at_mean - second @ (first @ mean)


def recall_threshold(
    active_scores: np.ndarray,  # any shape: scores of neurons that were active
    recall: float,
) -> float:
    """The largest threshold that this share of the active neurons exceeds. Nothing active: one that nothing exceeds."""
    count = active_scores.size
    if not count:
        return _NEVER
    missed = min(int((1 - recall) * count + 1e-6), count - 1)  # 1 - 0.9 is a little less than a tenth
    lowest = np.float32(np.partition(active_scores.ravel(), missed)[missed])
    below = float(np.nextafter(lowest, np.float32(-np.inf)))
    # XLA takes subnormal numbers for zero, and what scores zero would not exceed that.
    return min(below, -_SMALLEST) if abs(below) < _SMALLEST else below


def _cholesky(covariance: np.ndarray) -> np.ndarray:
    """L [D, D] float32 of a covariance that may lack directions, or be indefinite by rounding: a ridge as small as will do is added."""
    size = len(covariance)
    ridge = max(1e-5 * float(np.trace(covariance)) / size, 1e-20)
    while True:
        try:
            return np.linalg.cholesky(covariance + ridge * np.eye(size)).astype(np.float32)
        except np.linalg.LinAlgError:
            ridge *= 10


def _truncated_svd(
    up_blocks: RowBlocks, weighting: "_Diagonal | _Lower", rank: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """`second` [F, R] and `first` [R, D] with second @ first close to the matrix W, errors counted as (W - approximation) @ L."""
    width = min(rank + _OVERSAMPLE, weighting.size)
    basis = rng.standard_normal((weighting.size, width), np.float32)
    for _ in range(_POWER_ITERATIONS):
        left = _orthonormal(_times(up_blocks, weighting.times(basis)))
        basis, _ = np.linalg.qr(weighting.transposed_times(_transposed_times(up_blocks, left)))
    product = _times(up_blocks, weighting.times(basis))  # [F, width]
    # The right singular vectors of a tall matrix are the eigenvectors of its small Gram matrix, largest last.
    _, right = np.linalg.eigh(product.T @ product)
    right = right[:, ::-1][:, :rank]
    return (product @ right).astype(np.float32), weighting.transposed_solve(basis @ right).T.astype(np.float32)


class _Diagonal:
    """L for inputs that vary independently."""

    def __init__(self, deviation: np.ndarray) -> None:
        self.size, self._deviation = len(deviation), deviation[:, None]

    def times(self, columns: np.ndarray) -> np.ndarray:
        return self._deviation * columns

    transposed_times = times

    def transposed_solve(self, columns: np.ndarray) -> np.ndarray:
        """The x with L^T x = columns."""
        return columns / self._deviation


class _Lower:
    """L from a Cholesky decomposition."""

    def __init__(self, factor: np.ndarray) -> None:
        self.size, self._factor = len(factor), factor

    def times(self, columns: np.ndarray) -> np.ndarray:
        return self._factor @ columns

    def transposed_times(self, columns: np.ndarray) -> np.ndarray:
        return self._factor.T @ columns

    def transposed_solve(self, columns: np.ndarray) -> np.ndarray:
        """The x with L^T x = columns."""
        return np.linalg.solve(self._factor.T, columns)


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
