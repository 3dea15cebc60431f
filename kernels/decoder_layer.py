"""A decoder layer around its feed-forward block, and what lies before the first and after the last.

Axes: B sequences, T tokens of prompts, D d_model, E embedding width, H heads, N blocks of the KV cache,
size positions of each, M blocks of a sequence's table, V vocabulary.

The engine calls `attention_*`, adds feed-forward neurons to the residual as their rows arrive (`sparse_ffn`), then `after_ffn`.
Matrices are [outputs, inputs]. In pre-LN models a norm feeds attention and FFN; in post-LN ones (OPT-350m) it follows each sum.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from .attention import append, attend_chunk, attend_decode
from .linear import linear
from .norm import layer_norm

Weights = dict[str, jax.Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """What a compiled layer depends on besides its arrays; hashable, a static argument of `jit`.

    Attributes:
      num_heads: H; D is a multiple of it.
      norm_first: pre-LN; False: post-LN.
      norm_epsilon: added to the variance in every LayerNorm.
      compute_dtype: name of the products' operand dtype; sums, norms and the KV cache are float32.
    """

    num_heads: int
    norm_first: bool = True
    norm_epsilon: float = 1e-5
    compute_dtype: str = "bfloat16"


def embed(
    token_ids: jax.Array,  # [B] int32
    positions: jax.Array,  # [B] int32
    tables: Weights,  # tokens [V, E], positions, with E != D project_in [D, E]
    position_offset: int,
    *,
    compute_dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """The residual stream's start: [B, D] f32. Ids and positions beyond their tables (padding) give the last row."""
    x = tables["tokens"].at[token_ids].get(mode="clip").astype(jnp.float32)
    if "project_in" in tables:
        x = linear(x, tables["project_in"], compute_dtype=compute_dtype)
    return x + tables["positions"].at[positions + position_offset].get(mode="clip").astype(jnp.float32)


def attention_decode(
    x: jax.Array,  # [B, D] f32
    weights: Weights,
    keys: jax.Array,  # [H, N, size, head_dim] f32, donated by the caller
    values: jax.Array,  # likewise
    tables: jax.Array,  # [B, M] int32
    positions: jax.Array,  # [B] int32, of the tokens in x
    shape: LayerShape,
    *,
    num_positions: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One token of every sequence through attention.

    Args:
      num_positions: static bound on positions + 1, see `attend_decode`.

    Returns:
      residual [B, D] (the FFN's output bias included), the FFN's input [B, D], keys, values.
    """
    query, key, value = _query_key_value(x, weights, shape)
    rows = jnp.arange(x.shape[0])
    keys, values = append(keys, key, tables, rows, positions), append(values, value, tables, rows, positions)
    mixed = attend_decode(query, keys, values, tables, positions + 1, num_positions=num_positions)
    return *_after_attention(x, mixed, weights, shape), keys, values


def attention_chunk(
    x: jax.Array,  # [T, D] f32
    weights: Weights,
    keys: jax.Array,  # [H, N, size, head_dim] f32, donated by the caller
    values: jax.Array,  # likewise
    tables: jax.Array,  # [B, M] int32
    sequences: jax.Array,  # [T] int32, whose each token is; padding: B or more
    positions: jax.Array,  # [T] int32
    pieces: jax.Array,  # [pieces, 4] int32, see `attend_chunk`
    num_pieces: jax.Array,  # int32
    shape: LayerShape,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Tokens of one or many sequences' prompts through attention: residual [T, D], the FFN's input [T, D], keys, values."""
    query, key, value = _query_key_value(x, weights, shape)
    keys, values = append(keys, key, tables, sequences, positions), append(values, value, tables, sequences, positions)
    mixed = attend_chunk(query, keys, values, tables, pieces, num_pieces)
    return *_after_attention(x, mixed, weights, shape), keys, values


def after_ffn(
    x: jax.Array,  # [B, D] f32
    weights: Weights,
    shape: LayerShape,
) -> jax.Array:
    """What follows the last of the layer's neurons: the post-LN norm, or nothing: [B, D] f32."""
    return x if shape.norm_first else _norm(x, weights, "ffn_norm", shape)


def final_hidden(
    x: jax.Array,  # [B, D] f32
    tables: Weights,  # final_norm_scale, final_norm_bias [D] and project_out [E, D] where the model has them
    shape: LayerShape,
) -> jax.Array:
    """What the output head sees: [B, E] f32."""
    if "final_norm_scale" in tables:
        x = _norm(x, tables, "final_norm", shape)
    if "project_out" in tables:
        x = linear(x, tables["project_out"], compute_dtype=shape.compute_dtype)
    return x


def logits(
    x: jax.Array,  # [B, D] f32
    tables: Weights,  # as in `final_hidden`, and tokens or head [V, E]
    shape: LayerShape,
) -> jax.Array:
    """Scores of the next token: [B, V] f32."""
    hidden = final_hidden(x, tables, shape)
    return linear(hidden, tables.get("head", tables["tokens"]), compute_dtype=shape.compute_dtype)


def _norm(x: jax.Array, weights: Weights, name: str, shape: LayerShape) -> jax.Array:
    return layer_norm(x, weights[f"{name}_scale"], weights[f"{name}_bias"], shape.norm_epsilon)


def _query_key_value(x: jax.Array, weights: Weights, shape: LayerShape) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each [B, H, head_dim]."""
    normed = _norm(x, weights, "attention_norm", shape) if shape.norm_first else x
    fused = linear(normed, weights["qkv"], weights["qkv_bias"], compute_dtype=shape.compute_dtype)
    batch, d_model = x.shape
    query, key, value = jnp.split(fused, 3, axis=1)
    heads = (batch, shape.num_heads, d_model // shape.num_heads)
    return query.reshape(heads), key.reshape(heads), value.reshape(heads)


def _after_attention(x: jax.Array, mixed: jax.Array, weights: Weights, shape: LayerShape) -> tuple[jax.Array, jax.Array]:
    """The residual with the FFN's output bias, and the FFN's input."""
    out = linear(mixed, weights["attention_out"], weights["attention_out_bias"], compute_dtype=shape.compute_dtype)
    x = x + out
    if shape.norm_first:
        ffn_in = _norm(x, weights, "ffn_norm", shape)
    else:
        x = ffn_in = _norm(x, weights, "attention_norm", shape)
    return x + weights["down_bias"][None], ffn_in
