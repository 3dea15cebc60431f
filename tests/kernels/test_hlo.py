"""What the compiled programs must not contain: copies of weights, of the KV cache or of slots, in whatever dtype.

Axes: B sequences, D d_model, F d_ff, H heads, C capacity of the KV cache, S slots or rows of a block, K gathered neurons, R predictor
rank, V vocabulary.

The functions are the engine's own jitted objects, donation and compiler options included, at the sizes of a small real model. Read is the
optimised HLO: what an instruction outside fusions gives is a buffer in memory, what is inside one is not. XLA's own account of temporary
memory is asked, too. What a library packs inside one call is in neither; `inflash bench kernels` shows that as time.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inflash.kernels import native
from inflash.kernels.attention import append
from inflash.kernels.compilation import jit
from inflash.kernels.decoder_layer import LayerShape, attention_decode
from inflash.kernels.linear import linear
from inflash.kernels.predictor import LowRank
from inflash.pipeline import block_pool, cached_feed_forward, engine, feed_forward, kv_cache, matrix_source, predictors

D, F, H, C, S, K, R, V = 1024, 4096, 16, 256, 2048, 1024, 256, 50272
SIZE = block_pool.BLOCK_SIZE
SHAPE, COMPUTE = LayerShape(num_heads=H), np.dtype(jnp.bfloat16)
BATCHES = (1, 4, 8)  # 8 is the engine's default; above, kernels may gather rows, see `_add_slots`

PART = 4
"""An array of a quarter of a weight's elements counts as a copy: kernels that split rows do so in four, sums of groups are an eighth."""

Lowered = Any
Case = tuple[Lowered, int]
"""A function of the engine, lowered, and the elements of the smallest array that it must not copy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One line of HLO: what it gives (elements of each array), and the computations that it names."""

    opcode: str
    elements: tuple[int, ...]
    callees: tuple[str, ...]
    is_root: bool
    text: str


def parse(hlo: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations by name, and the entry's name."""
    computations: dict[str, list[Instruction]] = {}
    entry = current = ""
    for line in re.sub(r"/\*.*?\*/", "", hlo).splitlines():
        if header := re.match(r"(ENTRY )?%([^ ]+) \(.*\) -> .* \{$", line):
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif re.match(r"  (ROOT )?%", line):
            found = re.match(r"  (ROOT )?%\S+ = (\(.*?\)|\S+) ([a-z-]+)\(", line)
            assert found, f"no HLO as this test knows it: {line}"
            sizes = [math.prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"[a-z]\w*\[([\d,]*)\]", found[2])]
            attributes = re.findall(r"\b(?:calls|to_apply|body|condition|\w+_computations?)=(\{[^}]*\}|%\S+)", line)
            callees = [name for attribute in attributes for name in re.findall(r"%([^ ,}]+)", attribute)]
            computations[current].append(
                Instruction(
                    opcode=found[3],
                    elements=tuple(sizes),
                    callees=tuple(callees),
                    is_root=bool(found[1]),
                    text=line.strip()[:200],
                )
            )
    assert entry and computations[entry], "no HLO as this test knows it"
    return computations, entry


FORWARDING = {
    "parameter",
    "get-tuple-element",
    "bitcast",
    "tuple",
    "opt-barrier",
    "constant",
    "after-all",
}  # no buffer of their own
DESCENDED = {"while", "call", "conditional", "async-start"}  # buffers are those of the computations inside
IN_PLACE = {"scatter", "dynamic-update-slice"}


def buffers(computations: dict[str, list[Instruction]], name: str) -> Iterator[Instruction]:
    """Every instruction that fills memory of its own, from the computation `name` down; not into fusions and reductions."""
    for instruction in computations[name]:
        if instruction.opcode in DESCENDED:
            for callee in instruction.callees:
                yield from buffers(computations, callee)
        elif instruction.opcode not in FORWARDING:
            yield instruction


def updates_in_place(computations: dict[str, list[Instruction]], instruction: Instruction) -> bool:
    """Whether it is a scatter or an update of a slice, alone or as the root of a fusion; where XLA had to copy first, `copy` says so."""
    if instruction.opcode != "fusion":
        return instruction.opcode in IN_PLACE
    (fused,) = instruction.callees
    return any(inner.is_root and inner.opcode in IN_PLACE for inner in computations[fused])


def copies(compiled: Any, protected: int, cache: int = 0) -> list[str]:
    """Instructions that fill an array of at least a quarter of `protected` elements, updates of a cache of `cache` elements excepted."""
    computations, entry = parse(compiled.as_text())
    return [
        instruction.text
        for instruction in buffers(computations, entry)
        if max(instruction.elements, default=0) * PART >= protected
        and not (instruction.elements == (cache,) and updates_in_place(computations, instruction))
    ]


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def i32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def flags(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bool_)


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


def tables(embed_dim: int = D) -> dict[str, jax.ShapeDtypeStruct]:
    found = {"tokens": bf16(V, embed_dim), "positions": bf16(2050, D), "final_norm_scale": f32(D), "final_norm_bias": f32(D)}
    return found if embed_dim == D else found | {"project_in": bf16(D, embed_dim), "project_out": bf16(embed_dim, D)}


def cache(batch: int) -> jax.ShapeDtypeStruct:
    return f32(H, batch * C // SIZE, SIZE, D // H)


def block_tables(batch: int) -> jax.ShapeDtypeStruct:
    return i32(batch, C // SIZE)


def places(batch: int) -> jax.ShapeDtypeStruct:
    return i32(batch, 1 + C // SIZE)


def signs(batch: int) -> Lowered:
    return predictors._predict_signs.lower(
        f32(batch, D), signs=jax.ShapeDtypeStruct((F, D // 8), jnp.uint8), scale=f32(F), bias=f32(F), threshold=f32(1)
    )


def low_rank(batch: int) -> Lowered:
    """This layer's and the next one's, together."""
    shapes: list[Any] = [bf16(R, D), bf16(F, R), f32(F), f32(1)]
    weights = LowRank(*shapes)
    return predictors._predict_low_rank.lower(f32(batch, D), weights, weights, between=("none", "relu"))


def gathered(batch: int) -> Lowered:
    x = f32(batch, D)
    arguments = (x, x, bf16(S, 2, D), f32(F), flags(batch, F), i32(2, 1 + K))
    return cached_feed_forward._gathered.lower(*arguments, compute_dtype=COMPUTE)


def block(batch: int) -> Lowered:
    x, rows = f32(batch, D), bf16(S, D)
    return feed_forward._block.lower(x, x, rows, rows, f32(S), i32(), None, compute_dtype=COMPUTE)


def dense(batch: int) -> Lowered:
    x, rows = f32(batch, D), bf16(F, D)
    return feed_forward._dense.lower(x, x, rows, rows, f32(F), None, compute_dtype=COMPUTE)


DECODING: dict[str, Callable[[int], Case]] = {
    "_logits": lambda batch: (matrix_source._logits.lower(f32(batch, D), tables(), SHAPE), V * D),
    "_linear": lambda batch: (matrix_source._linear.lower(f32(batch, D), bf16(3 * D, D), compute_dtype=COMPUTE), 3 * D * D),
    "_embed": lambda batch: (
        matrix_source._embed.lower(i32(batch), i32(batch), tables(D // 2), 2, compute_dtype=COMPUTE),
        D // 2 * D,
    ),
    "_final_hidden": lambda batch: (matrix_source._final_hidden.lower(f32(batch, D), tables(D // 2), SHAPE), D // 2 * D),
    "_predict_low_rank": lambda batch: (low_rank(batch), R * D),
    "_predict_signs": lambda batch: (signs(batch), F * D // 8),
    "_predict_exact": lambda batch: (predictors._predict_exact.lower(f32(batch, D), bf16(F, D), f32(F)), F * D),
    "_gathered": lambda batch: (gathered(batch), K * D),
    "_block": lambda batch: (block(batch), S * D),
    "_dense": lambda batch: (dense(batch), F * D),
}
ELSEWHERE = {
    *("_attention_decode", "_attention_chunk"),  # tests of their own, below
    *("_after_ffn", "_put_rows", "_columns"),  # see no weights but norms
    *("_observed_block", "_low_rank_scores", "_sign_scores"),  # training and evaluation
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", DECODING)
def test_decoding_copies_no_weight(name: str, batch: int) -> None:
    lowered, protected = DECODING[name](batch)
    compiled = lowered.compile()
    assert not copies(compiled, protected)
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * protected  # not one weight as float32


@pytest.fixture
def native_form(built: Path) -> Iterator[None]:
    """What is traced inside calls the C++ kernels; JAX would take the other form's traces."""
    jax.clear_caches()
    with native.choosing(True):
        yield
    jax.clear_caches()


def test_native_forms_are_given_weights_where_they_lie(native_form: None) -> None:
    batch = 4
    for name, case in DECODING.items():
        lowered, protected = case(batch)
        compiled = lowered.compile()
        assert ("inflash_" in compiled.as_text()) == (name not in ("_predict_signs",)), name
        assert not copies(compiled, protected), name


def test_native_attention_is_given_the_donated_cache_where_it_lies(native_form: None) -> None:
    batch = 4
    arguments = (f32(batch, D), layer_weights(), cache(batch), cache(batch), places(batch), SHAPE)
    compiled = kv_cache._attention_decode.lower(*arguments, num_positions=C).compile()
    assert "inflash_attend" in compiled.as_text()
    assert not copies(compiled, min(batch * C * D, D * D), cache=batch * C * D)
    assert_donated(compiled, batch)


@pytest.mark.parametrize("positions", [C, C // 2])
@pytest.mark.parametrize("batch", BATCHES)
def test_decoding_writes_the_donated_cache_in_place(batch: int, positions: int) -> None:
    arguments = (f32(batch, D), layer_weights(), cache(batch), cache(batch), places(batch), SHAPE)
    compiled = kv_cache._attention_decode.lower(*arguments, num_positions=positions).compile()
    looked_at = batch * positions * D
    assert not copies(compiled, min(looked_at, D * D), cache=batch * C * D)
    assert_donated(compiled, batch)
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * looked_at  # not half of the keys looked at


@pytest.mark.parametrize("batch", [1, 8])
def test_prompts_write_the_donated_cache_in_place(batch: int) -> None:
    tokens = i32(6, 64)  # whose, where, and their pieces
    arguments = (f32(64, D), layer_weights(), cache(batch), cache(batch), block_tables(batch), tokens, SHAPE)
    compiled = kv_cache._attention_chunk.lower(*arguments).compile()
    whole = batch * C * D
    if batch > 1:  # one short sequence's cache is as large as what is made of its weights
        assert not copies(compiled, whole, cache=whole)
    computations, entry = parse(compiled.as_text())
    assert not [i.text for i in buffers(computations, entry) if i.opcode == "copy" and i.elements == (whole,)]
    assert_donated(compiled, batch)


def assert_donated(compiled: Any, batch: int) -> None:
    """Both caches, and nothing else, are given back in the memory that they came in."""
    header = compiled.as_text().split("\n", 1)[0]
    assert len(re.findall(r"(?:may|must)-alias", header)) == 2, header[:300]
    assert compiled.memory_analysis().alias_size_in_bytes == 2 * batch * C * D * 4


@pytest.mark.parametrize("num_tokens", [9, 64])
def test_many_tokens_need_no_second_resident_block(num_tokens: int) -> None:
    lowered = dense(num_tokens)
    assert not copies(lowered.compile(), F * D)


def test_every_jitted_function_of_the_pipeline_is_known_here() -> None:
    """Whoever adds one says here whether it may copy."""
    found: set[str] = set()
    for module in (cached_feed_forward, engine, feed_forward, kv_cache, matrix_source, predictors):
        for name, value in vars(module).items():
            named = {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
            found |= {full for full, inner in named.items() if isinstance(inner, type(jit(naive_product)))}
    assert found == set(DECODING) | ELSEWHERE


def naive_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return x @ weight.T.astype(jnp.float32)


def gather_first(x: jax.Array, pool: jax.Array, slots: jax.Array) -> jax.Array:
    return linear(x, jax.lax.optimization_barrier(pool[slots]))


def quarter_by_quarter(x: jax.Array, weight: jax.Array) -> jax.Array:
    parts = [jax.lax.optimization_barrier(weight[i : i + F // 4].astype(jnp.float32)) for i in range(0, F, F // 4)]
    return jnp.concatenate([linear(x, part) for part in parts], axis=1)


GUILTY: dict[str, tuple[Callable[..., jax.Array], tuple[Any, ...], int]] = {
    "product as float32": (naive_product, (f32(4, D), bf16(F, D)), F * D),
    "rows gathered first": (gather_first, (f32(4, D), bf16(S, D), i32(K)), K * D),
    "a quarter at a time": (quarter_by_quarter, (f32(1, D), bf16(F, D)), F * D),
    "inside a loop": (
        lambda x, weight: jax.lax.fori_loop(0, 3, lambda i, y: jnp.tanh(naive_product(y, weight * i.astype(weight.dtype))), x),
        (f32(1, D), bf16(D, D)),
        D * D,
    ),
}


@pytest.mark.parametrize("name", GUILTY)
def test_a_copy_would_be_noticed(name: str) -> None:
    function, arguments, protected = GUILTY[name]
    assert copies(jit(function).lower(*arguments).compile(), protected)


def append_as_float32(
    cache: jax.Array, new: jax.Array, tables: jax.Array, sequences: jax.Array, positions: jax.Array
) -> jax.Array:
    """What XLA up to jax 0.10 made of a cache of 16 bit by itself."""
    return append(cache.astype(jnp.float32), new.astype(jnp.float32), tables, sequences, positions).astype(cache.dtype)


@pytest.mark.parametrize("why", ["not donated", "kept as 16 bit"])
def test_a_copy_of_the_cache_would_be_noticed(why: str) -> None:
    batch = 4
    if why == "not donated":
        step = jit(partial(attention_decode, shape=SHAPE))
        compiled = step.lower(
            f32(batch, D), layer_weights(), cache(batch), cache(batch), block_tables(batch), i32(batch)
        ).compile()
        with pytest.raises(AssertionError):
            assert_donated(compiled, batch)
    else:
        half = jit(append_as_float32, donate_argnames="cache")
        compiled = half.lower(
            bf16(H, batch * C // SIZE, SIZE, D // H), bf16(batch, H, D // H), block_tables(batch), i32(batch), i32(batch)
        ).compile()
    assert copies(compiled, batch * C * D, cache=batch * C * D)
