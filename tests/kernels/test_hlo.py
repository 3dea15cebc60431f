"""What the compiled programs must not contain: copies of weights, of the KV cache or of the slots, in whatever dtype."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from inflash.kernels.compilation import jit
from inflash.kernels.decoder_layer import LayerShape, attention_chunk, attention_decode
from inflash.kernels.linear import linear
from inflash.kernels.sparse_ffn import block_ffn, gathered_ffn

D, F, H, C, S, K = 512, 2048, 8, 256, 4096, 256
NO_BUFFER = re.compile(r"\b(parameter|get-tuple-element|bitcast|tuple|opt-barrier|while|constant)\(")


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def i32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def largest_new_buffer(compiled, but_for: tuple[tuple[int, ...], ...] = ()) -> int:
    """Elements of the largest array that an instruction outside fusions writes; shapes in `but_for` are allowed."""
    largest = 0
    for computation in re.split(r"\n\n+", compiled.as_text()):
        header = computation.lstrip().split("\n", 1)[0]
        if "fused_computation" in header or "wrapped_" in header.split("(")[0]:
            continue
        for line in computation.split("\n")[1:]:
            if "=" not in line or NO_BUFFER.search(line):
                continue
            result = line.split("=", 1)[1].split(" fusion(")[0].split(" copy(")[0]
            for dims in re.findall(r"\b[a-z]+[0-9]*\[([0-9,]+)\]", result):
                shape = tuple(map(int, dims.split(",")))
                if shape not in but_for:
                    largest = max(largest, functools.reduce(int.__mul__, shape))
    return largest


def layer_weights() -> dict[str, jax.ShapeDtypeStruct]:
    vectors = (
        "attention_norm_scale",
        "attention_norm_bias",
        "attention_out_bias",
        "ffn_norm_scale",
        "ffn_norm_bias",
        "down_bias",
    )
    return {name: f32(D) for name in vectors} | {"qkv": bf16(3 * D, D), "qkv_bias": f32(3 * D), "attention_out": bf16(D, D)}


@pytest.mark.parametrize("batch", [1, 4])
def test_linear_makes_no_second_weight(batch):
    compiled = jit(linear).lower(f32(batch, D), bf16(F, D), f32(F)).compile()
    assert largest_new_buffer(compiled) <= batch * F
    assert compiled.memory_analysis().temp_size_in_bytes < F * D


@pytest.mark.parametrize("batch", [1, 4])
def test_gathered_ffn_makes_no_second_pool(batch):
    ffn = jit(functools.partial(gathered_ffn, compute_dtype="bfloat16"))
    flags = jax.ShapeDtypeStruct((batch, F), jnp.bool_)
    x, pool = f32(batch, D), bf16(S, D)
    compiled = ffn.lower(x, x, pool, pool, f32(F), flags, i32(K), i32(K), i32()).compile()
    assert largest_new_buffer(compiled) <= K * D  # not even the gathered rows, only their groups' sums
    assert compiled.memory_analysis().temp_size_in_bytes < K * D * 4


@pytest.mark.parametrize("num_tokens", [1, 4, 64])
def test_dense_block_makes_no_second_block(num_tokens):
    ffn = jit(functools.partial(block_ffn, count=S, compute_dtype="bfloat16"))
    compiled = ffn.lower(f32(num_tokens, D), f32(num_tokens, D), bf16(S, D), bf16(S, D), f32(S)).compile()
    assert largest_new_buffer(compiled) < S * D


@pytest.mark.parametrize("batch", [1, 4])
def test_decode_writes_the_donated_cache_in_place(batch):
    step = jit(functools.partial(attention_decode, shape=LayerShape(num_heads=H)), donate_argnames=("keys", "values"))
    cache = f32(batch, H, C, D // H)
    compiled = step.lower(f32(batch, D), layer_weights(), cache, cache, i32(batch)).compile()
    assert_cache_in_place(compiled, batch)
    assert compiled.memory_analysis().temp_size_in_bytes < batch * C * D * 2


@pytest.mark.parametrize("batch", [1, 4])
def test_chunk_writes_the_donated_cache_in_place(batch):
    chunk = jit(functools.partial(attention_chunk, shape=LayerShape(num_heads=H)), donate_argnames=("keys", "values"))
    cache = f32(batch, H, C, D // H)
    compiled = chunk.lower(f32(32, D), layer_weights(), cache, cache, i32(), i32(), i32()).compile()
    assert_cache_in_place(compiled, batch)


def assert_cache_in_place(compiled, batch: int) -> None:
    copies = re.findall(rf"= f32\[{batch},{H},{C},{D // H}\]\S* copy\(", compiled.as_text())
    assert not copies
    aliased = compiled.memory_analysis().alias_size_in_bytes
    assert aliased == 2 * batch * C * D * 4


def test_a_copy_would_be_noticed():
    """The check itself: a product that XLA gives to its matrix library converts the whole weight first."""

    def naive(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.einsum("bd,fd->bf", x, weight.astype(jnp.float32))

    assert largest_new_buffer(jit(naive).lower(f32(1, D), bf16(F, D)).compile()) >= F * D
