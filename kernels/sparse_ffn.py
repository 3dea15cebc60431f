"""The feed-forward block as a sum over neurons: any set of them can be added when their rows have arrived.

Axes: B batch or tokens, D d_model, F d_ff, S slots, P rows of a bundle (up, then down), K gathered neurons (padded),
n neurons of a streamed block.

A neuron adds `relu(up . x + bias) * down`. Both functions below add some neurons to an accumulator. What lies beyond `count` is
padding and may be uninitialised memory: those neurons read the first neuron's rows instead and are given activation 0, which costs
nothing, where masking the rows themselves (0 * NaN is NaN) would cost a pass over them.
"""

import jax
import jax.numpy as jnp
from jax import lax

from .linear import linear
from .native import native_block_ffn, native_gathered_ffn, serves
from .row_products import FEW_ROWS, MIXED_VECTORS, Rows, dot_rows, mix_rows, rounded

_ROWS_TOGETHER = 16  # rows are added in two halves of groups of eight; odd counts would be slow
_BITS = {2: jnp.uint16, 4: jnp.uint32}  # by bytes of an element


def gathered_ffn(
    accumulator: jax.Array,  # [B, D] f32
    x: jax.Array,  # [B, D] f32
    bundles: jax.Array,  # [S, P, D], as they lie on flash
    up_bias: jax.Array,  # [F] f32
    predicted: jax.Array,  # [B, F] bool
    slots: jax.Array,  # [K] int32, each in [0, S)
    neuron_ids: jax.Array,  # [K] int32, the neurons that lie there
    count: jax.Array,  # int32: how many of the K are real
    *,
    compute_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """The accumulator plus the neurons in the given slots, each for the sequences that it was predicted for: [B, D] f32.

    Args:
      compute_dtype: precision of the operands; rows of another dtype are converted after the gather. Sums are float32.
    """
    if serves(x.shape[0], compute_dtype, bundles, many=True) and slots.shape[0]:
        return native_gathered_ffn(accumulator, x, bundles, up_bias, predicted, count, slots, neuron_ids)
    padding = (0, -slots.shape[0] % _ROWS_TOGETHER)
    slots, neuron_ids = jnp.pad(slots, padding), jnp.pad(neuron_ids, padding)
    real = jnp.arange(slots.shape[0]) < count
    rows = bundles.reshape(-1, bundles.shape[-1])
    up_row = bundles.shape[1] * jnp.where(real, slots, slots[0])
    up_rows, down_rows = lax.optimization_barrier((up_row, up_row + 1))
    keep = real[None] & predicted.at[:, neuron_ids].get(mode="clip")
    bias = up_bias.at[neuron_ids].get(mode="clip")
    total = _add_rows(accumulator, x, (rows, up_rows), (rows, down_rows), bias, keep, jnp.dtype(compute_dtype))
    return jnp.where(count > 0, total, accumulator)


def block_ffn(
    accumulator: jax.Array,  # [B, D] f32
    x: jax.Array,  # [B, D] f32
    up: jax.Array,  # [n, D]
    down: jax.Array,  # [n, D]
    up_bias: jax.Array,  # [n] f32
    count: int | jax.Array,  # real rows of the block
    predicted: jax.Array | None = None,  # [B, n] bool; None: all
    *,
    compute_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """The accumulator plus a contiguous block of neurons, for one token or many: [B, D] f32.

    A Python int for `count` that equals n (the dense feed-forward block) spares many-token calls a copy of the block.
    """
    if serves(x.shape[0], compute_dtype, up, down, many=True):
        return native_block_ffn(accumulator, x, up, down, up_bias, predicted, count)
    num_rows = up.shape[0]
    if isinstance(count, int) and count == num_rows and x.shape[0] > FEW_ROWS:
        keep = jnp.ones((1, 1), bool) if predicted is None else predicted
        return _add_all(accumulator, x, up, down, up_bias, keep, jnp.dtype(compute_dtype))[0]
    padding = (0, -num_rows % _ROWS_TOGETHER)
    real = jnp.arange(num_rows + padding[1]) < count
    rows = lax.optimization_barrier(jnp.where(real, jnp.arange(len(real)), 0))
    keep = real[None] if predicted is None else real[None] & jnp.pad(predicted, ((0, 0), padding))
    up_bias = jnp.pad(up_bias, padding)
    total = _add_rows(accumulator, x, (up, rows), (down, rows), up_bias, keep, jnp.dtype(compute_dtype))
    return jnp.where(jnp.asarray(count) > 0, total, accumulator)


def observed_block_ffn(
    accumulator: jax.Array,  # [B, D] f32
    x: jax.Array,  # [B, D] f32
    up: jax.Array,  # [n, D]
    down: jax.Array,  # [n, D]
    up_bias: jax.Array,  # [n] f32
    count: jax.Array,  # real rows of the block
    predicted: jax.Array | None = None,  # [B, n] bool; None: all
    *,
    compute_dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, jax.Array]:
    """`block_ffn` for many tokens, and which neurons each of them activates, predicted or not: [B, D] f32 and [B, n] bool."""
    compute = jnp.dtype(compute_dtype)
    real = jnp.arange(up.shape[0]) < count
    rows = lax.optimization_barrier(jnp.where(real, jnp.arange(len(real)), 0))
    keep = real[None] if predicted is None else real[None] & predicted
    up_rows, down_rows = (_gathered(matrix, rows, compute)(0, len(real)) for matrix in (up, down))
    total, active = _add_all(accumulator, x, up_rows, down_rows, up_bias, keep, compute)
    return jnp.where(count > 0, total, accumulator), active & real[None]


def _add_rows(
    accumulator: jax.Array,
    x: jax.Array,
    up: tuple[jax.Array, jax.Array],  # [R, D], and which K of these rows: [K] int32
    down: tuple[jax.Array, jax.Array],  # likewise
    bias: jax.Array,  # [K] f32
    keep: jax.Array,  # [B, K] bool, or broadcastable to it
    compute: jnp.dtype,
) -> jax.Array:
    """The accumulator plus the neurons in these rows, which are read where they lie, unless there are many tokens."""
    num_rows = len(bias)
    if x.shape[0] > FEW_ROWS:
        up_rows, down_rows = (_gathered(*matrix, compute)(0, num_rows) for matrix in (up, down))
        return _add_all(accumulator, x, up_rows, down_rows, bias, keep, compute)[0]
    hidden, (down_matrix, down_rows) = dot_rows(rounded(x, compute), _gathered(*up, compute), num_rows), down
    hidden = rounded(jnp.where(keep, jax.nn.relu(hidden + bias[None]), 0.0), compute)
    mixed: list[jax.Array] = []
    for first in range(0, hidden.shape[0], MIXED_VECTORS):
        down_rows, mixed = lax.optimization_barrier((down_rows, mixed))  # passes that shared a gather would write it out first
        weights = hidden[first : first + MIXED_VECTORS]
        mixed.append(mix_rows(weights, _gathered(down_matrix, down_rows, compute), down_matrix.shape[1]))
    return accumulator + jnp.concatenate(mixed)


def _add_all(
    accumulator: jax.Array,
    x: jax.Array,
    up: jax.Array,  # [K, D]
    down: jax.Array,  # [K, D]
    bias: jax.Array,  # [K] f32
    keep: jax.Array,  # [B, K] bool, or broadcastable to it
    compute: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    """The accumulator plus all the given rows' neurons, for many tokens: two matrix products. Also what the ReLU lets through, [B, K]."""
    inputs = linear(x, up, bias, compute_dtype=compute)
    hidden = jnp.where(keep, jax.nn.relu(inputs), 0.0)
    # The barrier keeps the transpose inside `linear` out of this product, which XLA could not run on 16-bit operands.
    hidden = lax.optimization_barrier(hidden.astype(compute))
    contract_rows = (((1,), (0,)), ((), ()))
    mixed = lax.dot_general(hidden, down.astype(compute), contract_rows, preferred_element_type=jnp.float32)
    return accumulator + mixed, inputs > 0


def _gathered(matrix: jax.Array, rows: jax.Array, compute: jnp.dtype) -> Rows:
    """Some rows, moved as integers: XLA on CPU would move 16-bit floats as float32 and round every element back."""
    bits = lax.bitcast_convert_type(matrix, _BITS[matrix.dtype.itemsize])

    def some(start: int, stop: int) -> jax.Array:
        taken = bits.at[rows[start:stop]].get(mode="promise_in_bounds", wrap_negative_indices=False)
        return lax.bitcast_convert_type(taken, matrix.dtype).astype(compute)

    return some
