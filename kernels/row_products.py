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
_MAX_SUMS = 16  # accumulators that fit in vector registers
_MAX_MIXED = 4  # vectors that one pass of `mix_rows` serves before its loop spills
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
    """x with the precision of `dtype`, as float32. The barriers keep XLA from dropping it, or doing it once for every row."""
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
    weights: jax.Array,  # [B, K] f32
    rows: Rows,
) -> jax.Array:
    """Each weight vector's sum of weighted rows, `weights @ rows`: [B, D] f32."""
    batch, num_rows = weights.shape
    if batch == 1 and num_rows % 2 == 0:
        half = num_rows // 2
        first, second = mix([weights[0, :half], weights[0, half:]], [rows(0, half), rows(half, num_rows)])
        return (first + second)[None]
    mixed: list[jax.Array] = []
    for start in range(0, batch, _MAX_MIXED):
        mixed += mix([weights[b] for b in range(start, min(start + _MAX_MIXED, batch))], [rows(0, num_rows)])
        weights, mixed = lax.optimization_barrier((weights, mixed))
    return jnp.stack(mixed)


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
