"""Layer normalisation.

Axes: B rows, D d_model.
"""

import jax
import jax.numpy as jnp
from jax import lax


def layer_norm(
    x: jax.Array,  # [B, D] f32
    scale: jax.Array,  # [D] f32
    bias: jax.Array,  # [D] f32
    epsilon: float,
) -> jax.Array:
    """Each row with mean 0 and variance 1, then scaled and shifted: [B, D] f32. `epsilon` is added to the variance."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    return centred * lax.rsqrt(variance + epsilon) * scale[None] + bias[None]
