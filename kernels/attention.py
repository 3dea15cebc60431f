"""Causal attention over a preallocated KV cache in blocks.

Axes: B sequences, T tokens of a prompt chunk, H heads, N blocks of the cache, M blocks of a sequence's table, P positions looked at.

Keys and values are float32 [H, N, size, head_dim], where size is the positions of a block: XLA on CPU would convert a whole 16-bit cache to
float32 and back to write one position. A sequence's table [M] int32 names the blocks that hold its positions, in order; N stands for none.
Sequences may have blocks in common. Writing is in place where the caller donates the cache; what has no block is dropped. Positions beyond
a sequence's length are never looked at.
"""

import jax
import jax.numpy as jnp
from jax import lax

from .native import native_attend, serves_cache
from .row_products import join_spans, mix, one_pass_sums, row_spans

_FAR_BELOW = -1e30  # a masked score; finite, so that a row without any position stays a number
_SPANS = 4


def append_decode(
    cache: jax.Array,  # [H, N, size, head_dim] f32
    new: jax.Array,  # [B, H, head_dim] f32
    tables: jax.Array,  # [B, M] int32
    positions: jax.Array,  # [B] int32
) -> jax.Array:
    """The cache with one new position written in every sequence; one without a block is dropped."""
    _, num_blocks, size, _ = cache.shape
    rows = jnp.arange(tables.shape[0])
    blocks = tables.at[rows, positions // size].get(mode="fill", fill_value=num_blocks)
    return cache.at[:, blocks, positions % size].set(new.swapaxes(0, 1), mode="drop")


def attend_decode(
    query: jax.Array,  # [B, H, head_dim] f32
    keys: jax.Array,  # [H, N, size, head_dim] f32
    values: jax.Array,  # likewise
    tables: jax.Array,  # [B, M] int32
    lengths: jax.Array,  # [B] int32: positions that count, the newest included
    *,
    num_positions: int | None = None,
) -> jax.Array:
    """One query a sequence over its own positions: [B, H * head_dim] f32.

    Args:
      num_positions: P, static: no length exceeds it, so positions from there on are not even read. None: all of the tables. Fast when
        it is a multiple of 16.
    """
    if serves_cache(keys, values):
        return native_attend(query, keys, values, tables, lengths)
    batch, num_heads, head_dim = query.shape
    looked_at = tables.shape[1] * keys.shape[2] if num_positions is None else num_positions
    tables = lax.optimization_barrier(jnp.minimum(tables, keys.shape[1] - 1))  # here, or once for every row
    query = (query * head_dim**-0.5).swapaxes(0, 1)[:, :, None]
    products = [_rows(keys, tables, start, stop) * query for start, stop in row_spans(looked_at, _SPANS)]
    scores = join_spans(one_pass_sums(products, axis=3), looked_at)  # [H, B, P]
    visible = jnp.arange(looked_at)[None, None] < lengths[None, :, None]
    shares = jax.nn.softmax(jnp.where(visible, scores, _FAR_BELOW), axis=-1)
    half = looked_at // 2 if looked_at % 2 == 0 else looked_at
    starts = range(0, looked_at, half)
    mixed = mix([shares[:, :, i : i + half] for i in starts], [_rows(values, tables, i, i + half) for i in starts])
    return sum(mixed[1:], mixed[0]).swapaxes(0, 1).reshape(batch, num_heads * head_dim)


def _rows(cache: jax.Array, tables: jax.Array, start: int, stop: int) -> jax.Array:
    """Positions of every sequence, whose tables name blocks only: [H, B, stop - start, head_dim], an expression to fuse."""
    num_heads, _, size, head_dim = cache.shape
    first, end = start // size, -(-stop // size)
    blocks = cache.at[:, tables[:, first:end]].get(mode="promise_in_bounds")
    rows = blocks.reshape(num_heads, len(tables), (end - first) * size, head_dim)
    return rows[:, :, start - first * size : stop - first * size]


def append_chunk(
    cache: jax.Array,  # [H, N, size, head_dim] f32
    new: jax.Array,  # [T, H, head_dim] f32
    table: jax.Array,  # [M] int32
    start: jax.Array,  # int32, position of the first token
    count: jax.Array,  # int32, real tokens; the rest is padding
) -> jax.Array:
    """The cache with a chunk's `count` tokens written in one sequence from `start` on; padding, and what has no block, is dropped."""
    _, num_blocks, size, _ = cache.shape
    offsets = jnp.arange(new.shape[0])
    positions = start + offsets
    found = table.at[positions // size].get(mode="fill", fill_value=num_blocks)
    blocks = jnp.where(offsets < count, found, num_blocks)
    return cache.at[:, blocks, positions % size].set(new.swapaxes(0, 1), mode="drop")


def attend_chunk(
    query: jax.Array,  # [T, H, head_dim] f32
    keys: jax.Array,  # [H, N, size, head_dim] f32
    values: jax.Array,  # likewise
    table: jax.Array,  # [M] int32
    start: jax.Array,  # int32
    *,
    num_positions: int | None = None,
) -> jax.Array:
    """The chunk's queries over their sequence, token t over the positions up to start + t: [T, H * head_dim] f32.

    Rows of padding hold finite values without meaning.
    """
    num_tokens, num_heads, head_dim = query.shape
    size = keys.shape[2]
    looked_at = len(table) * size if num_positions is None else num_positions
    table = table[: -(-looked_at // size)]
    keys, values = (
        cache.at[:, table].get(mode="clip").reshape(num_heads, len(table) * size, head_dim)[:, :looked_at]
        for cache in (keys, values)
    )
    scores = jnp.einsum("thd,hpd->htp", query * head_dim**-0.5, keys)
    visible = jnp.arange(looked_at)[None] <= start + jnp.arange(num_tokens)[:, None]
    shares = jax.nn.softmax(jnp.where(visible[None], scores, _FAR_BELOW), axis=-1)
    mixed = jnp.einsum("htp,hpd->thd", shares, values)
    return mixed.reshape(num_tokens, num_heads * head_dim)
