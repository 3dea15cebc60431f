"""Causal attention over a preallocated KV cache in blocks.

Axes: B sequences, T tokens of prompts, Q of them that attend together, H heads, N blocks of the cache, M blocks of a sequence's table,
P positions looked at.

Keys and values are float32 [H, N, size, head_dim], where size is the positions of a block: XLA on CPU would convert a whole 16-bit cache to
float32 and back to write one position. A sequence's table [M] int32 names the blocks that hold its positions, in order; N stands for none.
Sequences may have blocks in common. Writing is in place where the caller donates the cache; what has no block is dropped. Positions beyond
a sequence's length count for nothing, even where they hold NaN.
"""

import jax
import jax.numpy as jnp
from jax import lax

from .native import native_attend, serves_cache
from .row_products import join_spans, mix, one_pass_sums, row_spans

_FAR_BELOW = -1e30  # a masked score; finite, so that a row without any position stays a number
_SPANS = 4

PIECE = 32
"""Tokens of one sequence's prompt that attend together, at most: Q."""
_LOOKED_AT = 64  # positions that they look at together


def append(
    cache: jax.Array,  # [H, N, size, head_dim] f32
    new: jax.Array,  # [T, H, head_dim] f32
    tables: jax.Array,  # [B, M] int32
    sequences: jax.Array,  # [T] int32, whose each token is; padding: B or more
    positions: jax.Array,  # [T] int32
) -> jax.Array:
    """The cache with one new position written for every token; padding, and what has no block, is dropped."""
    _, num_blocks, size, _ = cache.shape
    blocks = tables.at[sequences, positions // size].get(mode="fill", fill_value=num_blocks)
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
    visible = lax.optimization_barrier(jnp.arange(looked_at)[None, None] < lengths[None, :, None])  # once, not for every row
    shares = jax.nn.softmax(jnp.where(visible, scores, _FAR_BELOW), axis=-1)
    half = looked_at // 2 if looked_at % 2 == 0 else looked_at
    starts = range(0, looked_at, half)
    # A share of zero does not keep out NaN: beyond a sequence's length may be somebody else's.
    rows = [jnp.where(visible[:, :, i : i + half, None], _rows(values, tables, i, i + half), 0.0) for i in starts]
    mixed = mix([shares[:, :, i : i + half] for i in starts], rows)
    return sum(mixed[1:], mixed[0]).swapaxes(0, 1).reshape(batch, num_heads * head_dim)


def _rows(cache: jax.Array, tables: jax.Array, start: int, stop: int) -> jax.Array:
    """Positions of every sequence, whose tables name blocks only: [H, B, stop - start, head_dim], an expression to fuse."""
    num_heads, _, size, head_dim = cache.shape
    first, end = start // size, -(-stop // size)
    blocks = cache.at[:, tables[:, first:end]].get(mode="promise_in_bounds")
    rows = blocks.reshape(num_heads, len(tables), (end - first) * size, head_dim)
    return rows[:, :, start - first * size : stop - first * size]


def attend_chunk(
    query: jax.Array,  # [T, H, head_dim] f32
    keys: jax.Array,  # [H, N, size, head_dim] f32
    values: jax.Array,  # likewise
    tables: jax.Array,  # [B, M] int32
    pieces: jax.Array,  # [pieces, 4] int32: sequence, position of the first token, its place in T, and how many there are, up to PIECE
    num_pieces: jax.Array,  # int32: how many of the pieces are real
) -> jax.Array:
    """Prompts' queries, each over its own sequence up to itself: [T, H * head_dim] f32.

    Time follows the pieces that there are, and the positions that they see. Pieces are in the order of their places and leave none out;
    rows of padding hold finite values without meaning.
    """
    num_tokens, num_heads, head_dim = query.shape
    query = jnp.pad((query * head_dim**-0.5).swapaxes(0, 1), ((0, 0), (0, PIECE), (0, 0)))

    def attend(number: jax.Array, mixed: jax.Array) -> jax.Array:
        sequence, start, place, count = pieces[number]
        own = lax.dynamic_slice_in_dim(query, place, PIECE, axis=1)
        own = _attend_piece(own, keys, values, tables[sequence], start, count)
        return lax.dynamic_update_slice_in_dim(mixed, own, place, axis=1)  # the next piece writes over what is beyond the count

    mixed = lax.fori_loop(0, num_pieces, attend, jnp.zeros_like(query))
    return mixed[:, :num_tokens].swapaxes(0, 1).reshape(num_tokens, num_heads * head_dim)


def _attend_piece(
    query: jax.Array,  # [H, Q, head_dim] f32, scaled
    keys: jax.Array,  # [H, N, size, head_dim] f32
    values: jax.Array,  # likewise
    table: jax.Array,  # [M] int32
    start: jax.Array,  # int32, position of the first query
    count: jax.Array,  # int32: how many are real
) -> jax.Array:
    """Consecutive queries of a sequence over its positions, some positions at a time: [H, Q, head_dim].

    Softmax over what was seen so far: its sums are scaled down whenever a larger score comes.
    """
    num_heads, num_queries, head_dim = query.shape
    size = keys.shape[2]
    blocks_together = max(1, _LOOKED_AT // size)
    together = blocks_together * size
    table = jnp.pad(table, (0, -len(table) % blocks_together))
    last_seen = (start + jnp.minimum(jnp.arange(num_queries), count - 1))[None, :, None]

    def look(turn: jax.Array, before: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        top, total, mixed = before
        blocks = lax.dynamic_slice_in_dim(table, turn * blocks_together, blocks_together)
        own_keys, own_values = (
            cache.at[:, blocks].get(mode="clip").reshape(num_heads, together, head_dim) for cache in (keys, values)
        )
        positions = (turn * together + jnp.arange(together))[None, None]
        # A share of zero does not keep out NaN, and behind the piece's positions are somebody else's, or what was there before.
        own_values = jnp.where(positions.swapaxes(1, 2) < start + count, own_values, 0.0)
        scores = jnp.where(positions <= last_seen, jnp.einsum("hqd,hpd->hqp", query, own_keys), _FAR_BELOW)
        higher = jnp.maximum(top, jnp.max(scores, axis=-1))
        shares, kept = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
        mixed = mixed * kept[..., None] + jnp.einsum("hqp,hpd->hqd", shares, own_values)
        return higher, total * kept + jnp.sum(shares, axis=-1), mixed

    nothing = jnp.full(query.shape[:2], _FAR_BELOW), jnp.zeros(query.shape[:2]), jnp.zeros_like(query)
    _, total, mixed = lax.fori_loop(0, (start + count + together - 1) // together, look, nothing)
    return mixed / total[..., None]
