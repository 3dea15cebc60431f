"""Kernels in C++ in the place of XLA's, where a compiled library of them is there: faster, and the same results but for rounding.

Axes: B sequences, K inputs of a linear layer, or neurons of a gather, N its outputs, D d_model, F d_ff, S slots, P rows of a bundle,
n neurons of a block, R predictor rank, H heads, N blocks of the KV cache, size positions of each, M blocks of a sequence's table.

`inflash build-kernels` compiles `native.cc` for this machine; `pipeline.native_library` finds the result and registers it here. Until
then, and where there is none, every kernel is XLA's.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
import numpy as np

from .row_products import FEW_ROWS

_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))
_TARGETS = ("inflash_linear", "inflash_predict", "inflash_attend", "inflash_ffn")

_registered: list[ctypes.CDLL] = []  # kept for as long as the process lives, as XLA has its addresses
_used = [False]
_forced: ContextVar[bool | None] = ContextVar("forced", default=None)


def register(library: ctypes.CDLL) -> None:
    """Makes the library's kernels known to XLA; the first one that a process registers stays.

    Raises:
      AttributeError: it is another library.
    """
    if _registered:
        return
    capsules = {name: jax.ffi.pycapsule(getattr(library, name)) for name in _TARGETS}
    for name, capsule in capsules.items():
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    _registered.append(library)


def use(native: bool) -> None:
    """Whether kernels that are traced from now on are native ones; said once a process, by who has registered the library."""
    _used[0] = native


@contextmanager
def choosing(native: bool) -> Iterator[None]:
    """What is traced inside uses the native kernels, or does not: for comparisons. The library must have been registered.

    JAX keeps what it has traced: give `jit` a function of its own for each form.
    """
    before = _forced.set(native)
    try:
        yield
    finally:
        _forced.reset(before)


def serves(
    num_rows: int,
    compute_dtype: jax.typing.DTypeLike,
    *matrices: jax.Array,  # each [rows, columns], or bundles [S, P, D]
    many: bool = False,
) -> bool:
    """Whether the native kernels are to multiply these matrices with so many rows: asked when a kernel is traced.

    Args:
      many: the kernel serves more than `FEW_ROWS`, too.
    """
    dtype = jnp.dtype(compute_dtype)
    fit = dtype in _DTYPES and all(matrix.dtype == dtype and matrix.size for matrix in matrices)
    return fit and num_rows > 0 and (many or num_rows <= FEW_ROWS) and _chosen()


def serves_cache(*caches: jax.Array) -> bool:
    """Whether they are to attend to these KV caches, of any number of sequences: asked when a kernel is traced."""
    return all(cache.dtype == jnp.float32 and cache.size for cache in caches) and _chosen()


def native_linear(
    x: jax.Array,  # [B, K] f32
    weight: jax.Array,  # [N, K] bf16 or f32
    bias: jax.Array | None,  # [N] f32
) -> jax.Array:
    """`linear` with operands of the weight's dtype: [B, N] f32."""
    out = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32)
    bias = jnp.zeros(0, jnp.float32) if bias is None else bias
    return jax.ffi.ffi_call("inflash_linear", out)(_f32(x), weight, _f32(bias))


def native_predict(
    x: jax.Array,  # [B, D] f32
    predictors: Sequence[
        tuple[jax.Array, jax.Array, jax.Array, jax.Array]
    ],  # first [R, D], second [F, R], bias [F] f32, threshold [1] f32
    relu: Sequence[bool],  # for each: whether there is one between the products
) -> list[jax.Array]:
    """`predict_low_rank` for predictors in one dtype, bf16 or f32, with operands in it: [B, F] bool each."""
    named = [jax.ShapeDtypeStruct((x.shape[0], second.shape[0]), jnp.bool_) for _, second, _, _ in predictors]
    weights = [part for first, second, *vectors in predictors for part in (first, second, *map(_f32, vectors))]
    return list(jax.ffi.ffi_call("inflash_predict", named)(_f32(x), *weights, relu=np.asarray(relu, np.int32)))


def native_attend(
    query: jax.Array,  # [B, H, head_dim] f32
    keys: jax.Array,  # [H, N, size, head_dim] f32
    values: jax.Array,  # likewise
    tables: jax.Array,  # [B, M] int32
    lengths: jax.Array,  # [B] int32
) -> jax.Array:
    """`attend_decode`, which reads no position beyond the lengths: [B, H * head_dim] f32; zeros where there is none."""
    batch, num_heads, head_dim = query.shape
    out = jax.ShapeDtypeStruct((batch, num_heads * head_dim), jnp.float32)
    attend = jax.ffi.ffi_call("inflash_attend", out)
    return attend(_f32(query), keys, values, tables.astype(jnp.int32), lengths.astype(jnp.int32))


def native_gathered_ffn(
    accumulator: jax.Array,  # [B, D] f32
    x: jax.Array,  # [B, D] f32
    bundles: jax.Array,  # [S, P, D] bf16 or f32
    up_bias: jax.Array,  # [F] f32
    predicted: jax.Array,  # [B, F] bool
    count: jax.Array,  # int32: real ones of the K
    slots: jax.Array,  # [K] int32
    neuron_ids: jax.Array,  # [K] int32
) -> jax.Array:
    """`gathered_ffn` with operands of the bundles' dtype: [B, D] f32."""
    return _add_neurons(accumulator, x, bundles, bundles[:0, 0], up_bias, predicted, slots, neuron_ids, count)


def native_block_ffn(
    accumulator: jax.Array,  # [B, D] f32
    x: jax.Array,  # [B, D] f32
    up: jax.Array,  # [n, D] bf16 or f32
    down: jax.Array,  # likewise
    up_bias: jax.Array,  # [n] f32
    predicted: jax.Array | None,  # [B, n] bool; None: all
    count: int | jax.Array,  # int32: real rows of the block
) -> jax.Array:
    """`block_ffn` with operands of the rows' dtype: [B, D] f32."""
    predicted, nowhere = jnp.zeros(0, bool) if predicted is None else predicted, jnp.zeros(0, jnp.int32)
    return _add_neurons(accumulator, x, up, down, up_bias, predicted, nowhere, nowhere, count)


def _add_neurons(
    accumulator: jax.Array,
    x: jax.Array,
    up: jax.Array,  # [n, D], or bundles [S, P, D] and nothing in `down`
    down: jax.Array,
    up_bias: jax.Array,
    predicted: jax.Array,
    slots: jax.Array,
    neuron_ids: jax.Array,
    count: int | jax.Array,
) -> jax.Array:
    add = jax.ffi.ffi_call("inflash_ffn", jax.ShapeDtypeStruct(accumulator.shape, jnp.float32))
    places = slots.astype(jnp.int32), neuron_ids.astype(jnp.int32), jnp.asarray(count, jnp.int32)
    return add(_f32(accumulator), _f32(x), up, down, _f32(up_bias), predicted, *places)


def _chosen() -> bool:
    forced = _forced.get()
    return _used[0] if forced is None else forced


def _f32(array: jax.Array) -> jax.Array:
    return jnp.asarray(array).astype(jnp.float32)
