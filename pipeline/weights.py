"""Resident weights: from the store's checkpoints to JAX arrays, one copy in memory.

Axes: F d_ff, D d_model, V vocabulary, E embed_dim.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import ml_dtypes
import numpy as np

from ..errors import RunError
from ..storage.layout import TensorSpec, resident_layers, resident_specs
from ..storage.resident import Piece
from ..storage.store import Store

_ALIGNMENT = 64  # what XLA asks of memory that it is to use in place

COMPUTE_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


def compute_dtype(requested: str, stored: str) -> np.dtype:
    """The dtype of a product's operands. "auto" takes bfloat16 for every 16-bit store: float16 is 15 times slower on a CPU."""
    if requested == "auto":
        requested = "float32" if stored == "float32" else "bfloat16"
    return COMPUTE_DTYPES[requested]


def cpu_device():
    return jax.devices("cpu")[0]


def alias(view: np.ndarray) -> jax.Array:
    """A JAX array on the very memory of `view`; later writes to it are seen.

    JAX believes that arrays never change, so whoever writes must know that no dispatched computation still reads.

    Raises:
      RunError: JAX made a copy.
    """
    array = jax.device_put(view, cpu_device(), may_alias=True)
    if array.unsafe_buffer_pointer() != view.ctypes.data:
        raise RunError(f"JAX copied shared memory of shape {view.shape} instead of using it in place; jax {jax.__version__}")
    return array


def on_device(values: np.ndarray) -> jax.Array:
    """A copy on the device that products run on. Committed to it, like every kernel's result: jit compiles anew for one that is not."""
    return jax.device_put(values, cpu_device(), may_alias=False)


def zeros(shape: tuple[int, ...]) -> jax.Array:
    """float32 zeros, committed to the device."""
    return on_device(np.zeros(shape, np.float32))


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory that XLA can use in place."""
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


def gather_pieces(parts: Iterable[tuple[Piece, np.ndarray]], dtype: np.dtype) -> dict[str, np.ndarray]:
    """Whole tensors from their pieces: matrices in `dtype`, vectors as they are."""
    tensors: dict[str, np.ndarray] = {}
    for piece, rows in parts:
        name, shape = piece.spec.name, piece.spec.shape
        if name not in tensors:
            tensors[name] = aligned_empty(shape, dtype if len(shape) > 1 else rows.dtype)
        tensors[name][piece.start : piece.stop] = rows
    return tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    """What stays in memory for the whole run.

    Attributes:
      embeddings: the tables of `resident_specs(config, None)`.
      layers: a dictionary of `resident_specs(config, layer)` each, without `up_bias`.
      up_bias: [F] float32 each, in the order of the neurons on flash.
    """

    embeddings: dict[str, jax.Array]
    layers: list[dict[str, jax.Array]]
    up_bias: list[np.ndarray]


Skip = Callable[[int | None], frozenset[str]]
"""Names the tensors of a layer (None: the embeddings) that are not loaded."""


def skip_nothing(layer: int | None) -> frozenset[str]:
    """Everything is loaded."""
    return frozenset()


def load_weights(store: Store, dtype: np.dtype, skip: Skip = skip_nothing, *, verify: bool = False) -> ModelWeights:
    """Loads everything resident but what `skip` names; matrices become `dtype`. Checksums are compared if asked for."""
    embeddings = {
        name: alias(tensor)
        for name, tensor in gather_pieces(store.load_resident(None, skip=skip(None), verify=verify), dtype).items()
    }
    layers, up_bias = [], []
    for layer in range(store.config.num_layers):
        tensors = gather_pieces(store.load_resident(layer, skip=skip(layer), verify=verify), dtype)
        up_bias.append(np.ascontiguousarray(tensors.pop("up_bias")[store.neuron_order(layer)]))
        layers.append({name: alias(tensor) for name, tensor in tensors.items()})
    return ModelWeights(embeddings=embeddings, layers=layers, up_bias=up_bias)


def loaded_bytes(store: Store, dtype: np.dtype, skip: Skip = skip_nothing) -> int:
    """Bytes that `load_weights` would hold."""
    return sum(
        tensor_bytes(spec, dtype)
        for layer in resident_layers(store.config)
        for spec in resident_specs(store.config, layer, store.dtype)
        if spec.name not in skip(layer)
    )


def tensor_bytes(spec: TensorSpec, dtype: np.dtype) -> int:
    """Of a tensor in memory: matrices in the dtype of products, vectors in float32."""
    return int(np.prod(spec.shape)) * (dtype.itemsize if len(spec.shape) > 1 else 4)
