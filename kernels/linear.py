"""A linear layer whose cost is reading its weight once.

Axes: B rows of x (sequences in decoding, tokens in a prompt), K inputs, N outputs.
"""

import jax
import jax.numpy as jnp
from jax import lax

from .native import native_linear, serves
from .row_products import FEW_ROWS, dot_rows, rounded

_FEWEST_OUTPUTS = 16  # below, splitting the weight's rows into spans gains nothing


def linear(
    x: jax.Array,  # [B, K] f32
    weight: jax.Array,  # [N, K] f32, bf16 or f16
    bias: jax.Array | None = None,  # [N] f32
    *,
    compute_dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """`x @ weight.T + bias`: [B, N] f32.

    Operands have the precision of `compute_dtype` (by default the weight's), sums are float32. Up to eight rows of x take one pass
    over the weight; more take a matrix product with the weight on the left, the side that XLA does not repack.
    """
    dtype = weight.dtype if compute_dtype is None else compute_dtype
    num_outputs = weight.shape[0]
    if serves(x.shape[0], dtype, weight, many=True):
        return native_linear(x, weight, bias)
    if x.shape[0] <= FEW_ROWS and num_outputs >= _FEWEST_OUTPUTS:
        product = dot_rows(rounded(x, dtype), lambda start, stop: weight[start:stop].astype(dtype), num_outputs)
    else:
        # Without the barriers, transposes before or after would be folded into the product, which is then slower or cannot run.
        x = lax.optimization_barrier(x.astype(dtype))
        contract_last = (((1,), (1,)), ((), ()))
        product = lax.dot_general(weight.astype(dtype), x, contract_last, preferred_element_type=jnp.float32)
        product = lax.optimization_barrier(product).T
    return product if bias is None else product + bias[None]
