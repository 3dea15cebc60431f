"""Products of a few vectors with many rows, in one pass over the rows and without a copy of them.

Axes: B batch (few), K rows, D elements of a row.

XLA's own matrix product on CPU converts or repacks 16-bit rows first, which costs more than reading them. A *variadic* reduction,
several sums over one loop, is compiled to that very loop instead: rows are converted in registers, several of them share each load of
the vectors, and whatever makes the rows (a gather by slot) is fused in. `docs/log.md` has the measurements behind each constant.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

Rows = Callable[[int, int], jax.Array]  # (start, stop) -> rows [stop - start, D] of any float dtype, an expression to fuse

FEW_ROWS = 8  # vectors up to which these products beat a matrix product
MIXED_VECTORS = 4  # vectors that one pass of `mix_rows` serves before its loop spills
_MAX_SUMS = 16  # accumulators that fit in vector registers
_PARTIAL_BYTES = 8 << 20  # sums of groups kept by one pass: well inside the cache, and below what malloc returns to the system
_MIXED_ROWS = 8  # rows that one step of `mix_rows` adds up; more are not unrolled by the compiler


def one_pass_sums(
    terms: Sequence[jax.Array],  # each of one shape, f32
    axis: int,
) -> list[jax.Array]:
    """The sum of each array over `axis`, all in one loop, so that what they share is read once."""
    zeros = (jnp.zeros((), jnp.float32),) * len(terms)

    def add(left: tuple[jax.Array, ...], right: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(a + b for a, b in zip(left, right, strict=True))

    return list(lax.reduce(tuple(terms), zeros, add, (axis,)))


def row_spans(num_rows: int, num_spans: int) -> list[tuple[int, int]]:
    """(start, stop) of equally long spans that together cover all rows; the last ones overlap where rows do not divide."""
    length = -(-num_rows // num_spans)
    starts = [min(i * length, num_rows - length) for i in range(num_spans)]
    return [(start, start + length) for start in starts]


def join_spans(
    parts: Sequence[jax.Array],  # one a span: [..., length]
    num_rows: int,
) -> jax.Array:
    """Values of the spans of `row_spans` put together, overlaps dropped: [..., num_rows]."""
    length = parts[0].shape[-1]
    pieces = []
    for i, (start, _) in enumerate(row_spans(num_rows, len(parts))):
        first = min(i * length, num_rows)
        pieces.append(parts[i][..., first - start :])
    return jnp.concatenate(pieces, axis=-1)


def rounded(
    x: jax.Array,  # f32
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Float32 values with the precision of `dtype`. The barriers keep XLA from dropping that, or doing it once for every row."""
    return lax.optimization_barrier(lax.optimization_barrier(x.astype(dtype)).astype(jnp.float32))


def dot_rows(
    x: jax.Array,  # [B, D] f32
    rows: Rows,
    num_rows: int,
) -> jax.Array:
    """Each vector's product with each row: [B, K] f32."""
    batch = x.shape[0]
    # Far more than registers hold would spill; one sum alone would be handed back to the slow matrix product.
    spans = row_spans(num_rows, min(4, max(1, _MAX_SUMS // batch)))
    terms = [rows(start, stop).astype(jnp.float32) * x[b][None] for start, stop in spans for b in range(batch)]
    sums = one_pass_sums(terms, axis=1)
    return jnp.stack([join_spans(sums[b::batch], num_rows) for b in range(batch)])


def mix_rows(
    weights: jax.Array,  # [B, K] f32, B up to MIXED_VECTORS
    rows: Rows,
    width: int,
) -> jax.Array:
    """Each weight vector's sum of weighted rows, `weights @ rows`: [B, D] f32, D being `width`."""
    batch, num_rows = weights.shape
    rows_a_pass = max(_MIXED_ROWS**2, _PARTIAL_BYTES // (4 * width * batch) * _MIXED_ROWS)
    mixed = jnp.zeros((batch, width), jnp.float32)
    for start in range(0, num_rows, rows_a_pass):
        weights, mixed = lax.optimization_barrier((weights, mixed))  # one pass after another, in the same memory
        mixed = mixed + _mix_pass(weights, rows, start, min(start + rows_a_pass, num_rows))
    return mixed


def _mix_pass(weights: jax.Array, rows: Rows, start: int, stop: int) -> jax.Array:
    """`mix_rows` over the rows from start to stop."""
    batch, half = weights.shape[0], (stop - start) // 2
    if batch > 1 or (stop - start) % 2:
        return jnp.stack(mix([weights[b, start:stop] for b in range(batch)], [rows(start, stop)]))
    middle = start + half  # one sum alone would be handed back to the slow matrix product
    first, second = mix([weights[0, start:middle], weights[0, middle:stop]], [rows(start, middle), rows(middle, stop)])
    return (first + second)[None]


def mix(
    weights: Sequence[jax.Array],  # each [..., K] f32
    rows: Sequence[jax.Array],  # each [..., K, D], any float dtype; a single one serves all weights
) -> list[jax.Array]:
    """Weighted sums of rows, one for each weights array: [..., D] f32.

    Rows are added in groups, then the groups' sums: inside a group the loop over D is innermost, so it runs along each row.
    """
    rows = list(rows) * (len(weights) // len(rows))
    *lead, num_rows, width = rows[0].shape
    group = _group_size(num_rows)
    terms = [
        block.reshape(*lead, num_rows // group, group, width).astype(jnp.float32)
        * weight.reshape(*lead, num_rows // group, group, 1)
        for weight, block in zip(weights, rows, strict=True)
    ]
    sums = one_pass_sums(terms, axis=len(lead) + 1)
    while (num_groups := sums[0].shape[-2]) > 1:
        sums = lax.optimization_barrier(sums)
        group = _group_size(num_groups)
        parts = [part.reshape(*lead, num_groups // group, group, width) for part in sums]
        sums = one_pass_sums(parts, axis=len(lead) + 1)
    return [part.reshape(*lead, width) for part in sums]


def _group_size(num_rows: int) -> int:
    """The largest of 8, 4 and 2 that divides the rows, or all rows at once: slow, but no caller on the hot path does that."""
    return next((size for size in (_MIXED_ROWS, 4, 2) if num_rows % size == 0), num_rows)
