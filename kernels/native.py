"""Kernels in C++ in the place of XLA's, where a compiled library of them is there: faster, and the same results but for rounding.

Axes: B sequences, K inputs of a linear layer, N its outputs, D d_model, F d_ff, S slots, P places of a gather,
R predictor rank, H heads, N blocks of the KV cache, size positions of each, M blocks of a sequence's table.

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
    *matrices: jax.Array,  # each [rows, columns]
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


def native_ffn(
    accumulator: jax.Array,  # [B, D] f32
    x: jax.Array,  # [B, D] f32
    up: jax.Array,  # [S, D] bf16 or f32
    down: jax.Array,  # likewise
    up_bias: jax.Array,  # [F] f32; F is S without a gather
    predicted: jax.Array | None,  # [B, F] bool; None: all
    count: int | jax.Array,  # int32: real places of the gather, or rows of the block
    gather: tuple[jax.Array, jax.Array] | None = None,  # slots and neuron ids, [P] int32 each; None: neuron i lies in slot i
) -> jax.Array:
    """`gathered_ffn`, or `block_ffn` without a gather, with operands of the slots' dtype: [B, D] f32."""
    predicted = jnp.zeros(0, bool) if predicted is None else predicted
    slots, neuron_ids = (jnp.zeros(0, jnp.int32),) * 2 if gather is None else gather
    add = jax.ffi.ffi_call("inflash_ffn", jax.ShapeDtypeStruct(accumulator.shape, jnp.float32))
    operands = (_f32(accumulator), _f32(x), up, down, _f32(up_bias), predicted)
    return add(*operands, slots.astype(jnp.int32), neuron_ids.astype(jnp.int32), jnp.asarray(count, jnp.int32))


def _chosen() -> bool:
    forced = _forced.get()
    return _used[0] if forced is None else forced


def _f32(array: jax.Array) -> jax.Array:
    return jnp.asarray(array).astype(jnp.float32)
