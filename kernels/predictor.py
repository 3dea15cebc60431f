"""Which neurons will a token need? A score for each neuron, and a threshold.

Axes: B batch, D d_model, F d_ff, R predictor rank, W bytes of a packed row (D / 8, rounded up).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .linear import linear
from .native import native_predict, serves
from .row_products import FEW_ROWS, dot_rows

_BITS = 8


class LowRank(NamedTuple):
    """One layer's low-rank predictor, first and second in the same dtype.

    Attributes:
      first: [R, D], the paper's A.
      second: [F, R], the paper's B.
      bias: [F] f32.
      threshold: [1] f32, neurons with larger scores are named.
    """

    first: jax.Array
    second: jax.Array
    bias: jax.Array
    threshold: jax.Array


def low_rank_scores(
    h: jax.Array,  # [B, D] f32, the FFN's input
    first: jax.Array,  # [R, D], the paper's A
    second: jax.Array,  # [F, R], the paper's B
    bias: jax.Array,  # [F] f32
    *,
    between: str = "none",
) -> jax.Array:
    """`second @ f(first @ h) + bias`: [B, F] f32.

    Args:
      between: f; "none", as in the paper (arXiv:2312.11514, 3.1), or "relu", as in PowerInfer's predictors.
    """
    coordinates = linear(h, first)
    return linear(jax.nn.relu(coordinates) if between == "relu" else coordinates, second, bias)


def sign_scores(
    h: jax.Array,  # [B, D] f32
    signs: jax.Array,  # [F, W] uint8, laid out as `storage.predictor_layout` says
    scale: jax.Array,  # [F] f32
    bias: jax.Array,  # [F] f32
) -> jax.Array:
    """`scale * (signs @ h) + bias` with signs of +1 and -1, a bit each: [B, F] f32.

    A set bit counts 1 and an unset one 0, so that padding counts nothing; the signs' product is twice that less the sum of h.
    """
    width = signs.shape[1]
    h = h.astype(jnp.float32)
    planes = jnp.pad(h, ((0, 0), (0, _BITS * width - h.shape[1]))).reshape(len(h), _BITS, width)
    ones = sum(_plane_products(planes[:, bit], signs, bit) for bit in range(_BITS))
    return scale[None] * (2 * ones - h.sum(axis=1, keepdims=True)) + bias[None]


def predict_low_rank(
    h: jax.Array,  # [B, D] f32
    *predictors: LowRank,
    between: Sequence[str],
) -> list[jax.Array]:
    """For each predictor the neurons whose `low_rank_scores` exceed its threshold: [B, F] bool.

    Args:
      between: as for `low_rank_scores`, for each predictor.
    """
    matrices = [matrix for predictor in predictors for matrix in (predictor.first, predictor.second)]
    if serves(h.shape[0], matrices[0].dtype, *matrices):
        return native_predict(h, predictors, [each == "relu" for each in between])
    return [
        low_rank_scores(h, one.first, one.second, one.bias, between=each) > one.threshold[0]
        for one, each in zip(predictors, between, strict=True)
    ]


def predict_signs(
    h: jax.Array,  # [B, D] f32
    signs: jax.Array,  # [F, W] uint8
    scale: jax.Array,  # [F] f32
    bias: jax.Array,  # [F] f32
    threshold: jax.Array,  # [1] f32
) -> jax.Array:
    """Neurons whose `sign_scores` exceed the threshold: [B, F] bool."""
    return sign_scores(h, signs, scale, bias) > threshold[0]


def predict_exact(
    h: jax.Array,  # [B, D] f32
    up: jax.Array,  # [F, D]
    up_bias: jax.Array,  # [F] f32
    *,
    compute_dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Neurons that the ReLU lets through, from the up projection itself: [B, F] bool."""
    return linear(h, up, up_bias, compute_dtype=compute_dtype) > 0


def _plane_products(h: jax.Array, signs: jax.Array, bit: int) -> jax.Array:
    """The sums of h [B, W] where the given bit of each byte is set: [B, F]."""

    def rows(start: int, stop: int) -> jax.Array:
        return ((signs[start:stop] >> jnp.uint8(bit)) & jnp.uint8(1)).astype(jnp.float32)

    if h.shape[0] <= FEW_ROWS:
        return dot_rows(h, rows, signs.shape[0])
    return linear(h, rows(0, signs.shape[0]))
