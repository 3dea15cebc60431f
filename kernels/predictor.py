"""Which neurons will a token need? A guess is a boolean for each neuron.

Axes: B batch, D d_model, F d_ff, R predictor rank.
"""

import jax

from .linear import linear


def predict(
    h: jax.Array,  # [B, D] f32, what the up projection will read
    first: jax.Array,  # [R, D], the paper's A
    second: jax.Array,  # [F, R], the paper's B
    bias: jax.Array,  # [F] f32
    threshold: jax.Array,  # [1] f32
) -> jax.Array:
    """Neurons whose low-rank score exceeds the threshold: [B, F] bool.

    Reference: arXiv:2312.11514, 3.1
    """
    return linear(linear(h, first), second, bias) > threshold[0]


def predict_exact(
    h: jax.Array,  # [B, D] f32
    up: jax.Array,  # [F, D]
    up_bias: jax.Array,  # [F] f32
    *,
    compute_dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Neurons that the ReLU lets through, from the up projection itself: [B, F] bool."""
    return linear(h, up, up_bias, compute_dtype=compute_dtype) > 0
