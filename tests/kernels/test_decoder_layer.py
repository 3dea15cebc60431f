import functools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from paged import random_cache, random_tables

from inflash.kernels import decoder_layer, reference
from inflash.kernels.compilation import jit
from inflash.kernels.decoder_layer import LayerShape

SIZES = [(96, 3), (200, 4), (256, 8)]  # D, H
EPSILON = 1e-5
DTYPES = [np.float32, ml_dtypes.bfloat16]
# Compiling is what takes time, so dtypes and the order of the norms alternate: every pair of values occurs, not every triple.
DECODING = [(s, b, DTYPES[(i + j) % 2], (3 * i + j) // 2 % 2 == 0) for i, s in enumerate(SIZES) for j, b in enumerate([1, 5, 9])]
# Heads of the third of the sizes are as wide as those of the first.
CHUNKS = [(s, d, i == k) for i, s in enumerate(SIZES[:2]) for k, d in enumerate(DTYPES)]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def normal(rng: np.random.Generator, *shape: int, dtype=np.float32) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def layer_weights(rng, d_model: int, dtype) -> dict[str, np.ndarray]:
    matrices = {
        "qkv": (normal(rng, 3 * d_model, d_model) / d_model**0.5).astype(dtype),
        "attention_out": (normal(rng, d_model, d_model) / d_model**0.5).astype(dtype),
    }
    vectors = (
        "attention_norm_scale",
        "attention_norm_bias",
        "attention_out_bias",
        "ffn_norm_scale",
        "ffn_norm_bias",
        "down_bias",
    )
    return matrices | {name: normal(rng, d_model) for name in vectors} | {"qkv_bias": normal(rng, 3 * d_model)}


def on_device(weights: dict[str, np.ndarray]) -> dict:
    return {name: jnp.asarray(weight) for name, weight in weights.items()}


def tolerance(dtype) -> float:
    """Values are of size 3 or so after the norm's scale; bfloat16 rounds what enters each of the two products by 2**-9."""
    return 1e-4 if dtype == np.float32 else 0.2


@pytest.mark.parametrize(("sizes", "batch", "dtype", "norm_first"), DECODING)
def test_decode_agrees_with_reference(rng, sizes, batch, dtype, norm_first):
    d_model, num_heads = sizes
    weights = layer_weights(rng, d_model, dtype)
    x = normal(rng, batch, d_model)
    tables, num_blocks = random_tables(rng, batch, 32, 8)
    keys, values = (random_cache(rng, num_heads, num_blocks, 8, d_model // num_heads) for _ in "kv")
    positions = rng.integers(0, 32, batch, dtype=np.int32)
    shape = LayerShape(num_heads=num_heads, norm_first=norm_first, norm_epsilon=EPSILON, compute_dtype=np.dtype(dtype).name)
    step = jit(decoder_layer.attention_decode, static_argnames="shape")
    residual, ffn_in, new_keys, new_values = map(
        np.asarray, step(x, on_device(weights), keys, values, tables, positions, shape=shape)
    )
    written = np.zeros((num_blocks, 8), bool)
    for b, position in enumerate(positions):
        nothing = np.zeros((num_heads, 0, d_model // num_heads))
        own_keys, own_values = (
            reference.positions_of(cache, tables[b], position) if position else nothing for cache in (keys, values)
        )
        expected = reference.decoder_attention(x[b], weights, own_keys, own_values, num_heads, norm_first, EPSILON)
        np.testing.assert_allclose(residual[b], expected[0], atol=tolerance(dtype))
        np.testing.assert_allclose(ffn_in[b], expected[1], atol=tolerance(dtype))
        written[tables[b, position // 8], position % 8] = True
    np.testing.assert_array_equal(new_keys[:, ~written], keys[:, ~written])
    np.testing.assert_array_equal(new_values[:, ~written], values[:, ~written])


@pytest.mark.parametrize(("sizes", "dtype", "norm_first"), CHUNKS)
def test_chunks_and_single_tokens_agree(rng, sizes, dtype, norm_first):
    """A prompt in padded chunks, and token by token: the same residuals and the same cache."""
    d_model, num_heads = sizes
    weights, x = on_device(layer_weights(rng, d_model, dtype)), normal(rng, 21, d_model)
    shape = LayerShape(num_heads=num_heads, norm_first=norm_first, norm_epsilon=EPSILON, compute_dtype=np.dtype(dtype).name)
    chunk = jit(functools.partial(decoder_layer.attention_chunk, shape=shape))
    step = jit(functools.partial(decoder_layer.attention_decode, shape=shape))
    cache = [random_cache(rng, num_heads, 6, 8, d_model // num_heads) for _ in "kv"]
    tables = np.asarray([[4, 0, 5], [3, 1, 2]], np.int32)
    keys, values = cache
    parts = []
    for start, count in [(0, 16), (16, 5)]:
        padded = np.full((16, d_model), 1e6, np.float32)
        padded[:count] = x[start : start + count]
        owners, positions = np.full(16, 2, np.int32), np.zeros(16, np.int32)
        owners[:count], positions[:count] = 1, range(start, start + count)
        pieces = np.asarray([[1, start, 0, count]], np.int32)
        residual, ffn_in, keys, values = chunk(padded, weights, keys, values, tables, owners, positions, pieces, np.int32(1))
        parts.append((np.asarray(residual)[:count], np.asarray(ffn_in)[:count]))
    step_keys, step_values = cache
    for t in range(21):
        residual, ffn_in, step_keys, step_values = step(
            x[t : t + 1], weights, step_keys, step_values, tables[:1], np.asarray([t], np.int32)
        )
        part, row = divmod(t, 16)
        np.testing.assert_allclose(parts[part][0][row], np.asarray(residual)[0], atol=tolerance(dtype))
        np.testing.assert_allclose(parts[part][1][row], np.asarray(ffn_in)[0], atol=tolerance(dtype))
    for chunked, stepped, before in zip((keys, values), (step_keys, step_values), cache, strict=True):
        found = [
            reference.positions_of(np.asarray(each), table, 21) for each, table in zip((stepped, chunked), tables, strict=True)
        ]
        np.testing.assert_allclose(found[1], found[0], atol=tolerance(dtype))
        np.testing.assert_array_equal(np.asarray(chunked)[:, tables[0]], before[:, tables[0]])


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("batch", [1, 12])
def test_embedding_and_logits(rng, projected, tied, batch):
    d_model, embed_dim, vocab = 96, (64 if projected else 96), 301
    tables = {"tokens": normal(rng, vocab, embed_dim), "positions": normal(rng, 34, d_model)}
    if projected:
        tables |= {"project_in": normal(rng, d_model, embed_dim), "project_out": normal(rng, embed_dim, d_model)}
    else:
        tables |= {"final_norm_scale": normal(rng, d_model), "final_norm_bias": normal(rng, d_model)}
    if not tied:
        tables["head"] = normal(rng, vocab, embed_dim)
    ids, positions = rng.integers(0, vocab, batch, dtype=np.int32), rng.integers(0, 32, batch, dtype=np.int32)

    x = tables["tokens"][ids].astype(np.float64)
    expected = (x @ tables["project_in"].T if projected else x) + tables["positions"][positions + 2]
    found = jit(decoder_layer.embed, static_argnums=3)(ids, positions, tables, 2)
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-4)

    if projected:
        top = expected @ tables["project_out"].T.astype(np.float64)
    else:
        top = reference.layer_norm(expected, tables["final_norm_scale"], tables["final_norm_bias"], EPSILON)
    scores = reference.linear(top, tables["tokens" if tied else "head"])
    shape = LayerShape(num_heads=4, compute_dtype="float32")
    found = jit(decoder_layer.logits, static_argnums=2)(expected.astype(np.float32), tables, shape)
    np.testing.assert_allclose(np.asarray(found), scores, atol=2e-6 * np.abs(scores).max() * 10)


def test_positions_of_padding_stay_finite(rng):
    tables = {"tokens": normal(rng, 10, 16), "positions": normal(rng, 12, 16)}
    found = jit(decoder_layer.embed, static_argnums=3)(np.zeros(4, np.int32), np.arange(8, 12, dtype=np.int32), tables, 2)
    assert np.isfinite(np.asarray(found)).all()


def test_only_post_norm_layers_have_a_norm_after_the_ffn(rng):
    x, weights = normal(rng, 3, 96), layer_weights(rng, 96, np.float32)
    pre, post = (LayerShape(num_heads=3, norm_first=first, norm_epsilon=EPSILON) for first in (True, False))
    np.testing.assert_array_equal(np.asarray(decoder_layer.after_ffn(jnp.asarray(x), on_device(weights), pre)), x)
    expected = reference.layer_norm(x, weights["ffn_norm_scale"], weights["ffn_norm_bias"], EPSILON)
    found = decoder_layer.after_ffn(jnp.asarray(x), on_device(weights), post)
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-5)
