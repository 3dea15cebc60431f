"""Causal attention over a preallocated KV cache.

Axes: B sequences (rows of the cache), T tokens of a prompt chunk, H heads, C capacity in positions, P positions looked at (C, or less).

Keys and values are float32 [B, H, C, head_dim]: XLA on CPU would convert a whole 16-bit cache to float32 and back to write one
position. Writing is in place where the caller donates the cache. Positions beyond a sequence's length are never looked at.
"""

import jax
import jax.numpy as jnp

from .native import native_attend, serves_cache
from .row_products import join_spans, mix, one_pass_sums, row_spans

_FAR_BELOW = -1e30  # a masked score; finite, so that a row without any position stays a number
_SPANS = 4


def append_decode(
    cache: jax.Array,  # [B, H, C, head_dim] f32
    new: jax.Array,  # [B, H, head_dim] f32
    positions: jax.Array,  # [B] int32
) -> jax.Array:
    """The cache with one new position written in every sequence; one at or beyond C is dropped."""
    return cache.at[jnp.arange(cache.shape[0]), :, positions].set(new, mode="drop", unique_indices=True)


def attend_decode(
    query: jax.Array,  # [B, H, head_dim] f32
    keys: jax.Array,  # [B, H, C, head_dim] f32
    values: jax.Array,  # [B, H, C, head_dim] f32
    lengths: jax.Array,  # [B] int32: positions that count, the newest included
    *,
    num_positions: int | None = None,
) -> jax.Array:
    """One query a sequence over its own positions: [B, H * head_dim] f32.

    Args:
      num_positions: P, static: no length exceeds it, so positions from there on are not even read. None: C. Fast when it is a
        multiple of 16.
    """
    if serves_cache(keys, values):
        return native_attend(query, keys, values, lengths)
    batch, num_heads, capacity, head_dim = keys.shape
    looked_at = capacity if num_positions is None else num_positions
    query = (query * head_dim**-0.5)[:, :, None]
    products = [keys[:, :, start:stop] * query for start, stop in row_spans(looked_at, _SPANS)]
    scores = join_spans(one_pass_sums(products, axis=3), looked_at)  # [B, H, P]
    visible = jnp.arange(looked_at)[None, None] < lengths[:, None, None]
    shares = jax.nn.softmax(jnp.where(visible, scores, _FAR_BELOW), axis=-1)
    half = looked_at // 2 if looked_at % 2 == 0 else looked_at
    starts = range(0, looked_at, half)
    mixed = mix([shares[:, :, i : i + half] for i in starts], [values[:, :, i : i + half] for i in starts])
    return sum(mixed[1:], mixed[0]).reshape(batch, num_heads * head_dim)


def append_chunk(
    cache: jax.Array,  # [B, H, C, head_dim] f32
    new: jax.Array,  # [T, H, head_dim] f32
    slot: jax.Array,  # int32, a row of the cache
    start: jax.Array,  # int32, position of the first token
    count: jax.Array,  # int32, real tokens; the rest is padding
) -> jax.Array:
    """The cache with a chunk's `count` tokens written in one sequence from `start` on; padding, and what exceeds C, is dropped."""
    capacity = cache.shape[2]
    offsets = jnp.arange(new.shape[0])
    positions = jnp.where(offsets < count, start + offsets, capacity)
    return cache.at[slot, :, positions].set(new, mode="drop", unique_indices=False)


def attend_chunk(
    query: jax.Array,  # [T, H, head_dim] f32
    keys: jax.Array,  # [B, H, C, head_dim] f32
    values: jax.Array,  # [B, H, C, head_dim] f32
    slot: jax.Array,  # int32
    start: jax.Array,  # int32
    *,
    num_positions: int | None = None,
) -> jax.Array:
    """The chunk's queries over their sequence, token t over the positions up to start + t: [T, H * head_dim] f32.

    Rows of padding hold finite values without meaning.
    """
    num_tokens, num_heads, head_dim = query.shape
    looked_at = keys.shape[2] if num_positions is None else num_positions
    scores = jnp.einsum("thd,hpd->htp", query * head_dim**-0.5, keys[slot, :, :looked_at])
    visible = jnp.arange(looked_at)[None] <= start + jnp.arange(num_tokens)[:, None]
    shares = jax.nn.softmax(jnp.where(visible[None], scores, _FAR_BELOW), axis=-1)
    mixed = jnp.einsum("htp,hpd->thd", shares, values[slot, :, :looked_at])
    return mixed.reshape(num_tokens, num_heads * head_dim)
