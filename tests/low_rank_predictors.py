"""Random low-rank predictors, and what they have to name.

Axes: B batch, D d_model, F d_ff, R predictor rank.
"""

import jax.numpy as jnp
import numpy as np

from inflash.kernels import reference
from inflash.kernels.predictor import LowRank


def random_predictor(rng, d_model, d_ff, rank, dtype) -> LowRank:
    return LowRank(
        first=jnp.asarray((rng.standard_normal((rank, d_model)) / d_model**0.5).astype(dtype)),
        second=jnp.asarray(rng.standard_normal((d_ff, rank)).astype(dtype)),
        bias=jnp.asarray(rng.standard_normal(d_ff), jnp.float32),
        threshold=jnp.asarray(rng.standard_normal(1), jnp.float32),
    )


def assert_named(found: np.ndarray, h: np.ndarray, predictor: LowRank, between: str) -> None:
    """The same neurons as in float64, but for those so near the threshold that rounding decides."""
    first, second, bias, threshold = (np.asarray(part) for part in predictor)
    expected, margin = reference.predict(h.astype(first.dtype), first, second, bias, float(threshold[0]), between=between)
    # Between the two products values of size 1 are rounded: 2**-9 in bfloat16, summed over the rank.
    clear = np.abs(margin) > (0.02 * len(first) ** 0.5 if first.dtype != np.float32 else 1e-4)
    assert found.dtype == bool and clear.mean() > 0.8
    np.testing.assert_array_equal(found[clear], expected[clear])
    assert 0 < found.mean() < 1
