"""What a low-rank predictor is trained to make small.

Axes: B tokens, D d_model, F d_ff, R rank.
"""

import jax
import jax.numpy as jnp

Parameters = dict[str, jax.Array]


def balanced_loss(
    parameters: Parameters,  # first [R, D], second [F, R], bias [F], log_sharpness []; f32
    h: jax.Array,  # [B, D] f32
    active: jax.Array,  # [B, F] bool
    share: jax.Array,  # []: how many of a layer's pairs are active, 0 to 1
) -> jax.Array:
    """Cross-entropy of `sigmoid(sharpness * (second @ (first @ h) + bias))` in which active and inactive neurons weigh the same: [].

    A predictor that knows nothing has a loss of log 2. Reference: arXiv:2312.11514, 3.1 (a loss balanced over both).
    """
    scores = (h @ parameters["first"].T) @ parameters["second"].T + parameters["bias"][None]
    logits = scores * jnp.exp(parameters["log_sharpness"])
    wrong = jax.nn.softplus(jnp.where(active, -logits, logits))
    return jnp.mean(wrong * jnp.where(active, 0.5 / share, 0.5 / (1 - share)))
