"""What an engine will hold in memory, by part, before there is one.

Axes: B sequences, C positions of the KV cache, D d_model, F d_ff, S slots.
"""

import numpy as np

from ..errors import InflashError
from ..storage.store import Store
from .feed_forward import STREAM_BLOCK_BYTES, STREAM_BUFFERS
from .fixed_shapes import capacity_for
from .host_memory import program_bytes
from .matrix_source import STREAMED_NAMES
from .options import EngineOptions
from .predictors import choose_predictor, choose_prefetch, predictor_bytes
from .weights import compute_dtype, loaded_bytes


def memory_parts(store: Store, options: EngineOptions) -> dict[str, int]:
    """Bytes by name; the KV cache comes on top, see `kv_cache_bytes`.

    Raises:
      InflashError: the store has no such predictor.
    """
    config, compute = store.config, compute_dtype(options.compute_dtype, store.dtype)
    slots = {"sparse": options.cache_slots(config.d_ff), "resident": config.d_ff}.get(options.ffn, 0)
    predictors = []
    if options.ffn == "sparse":
        name = choose_predictor(store, options.predictor)
        predictors = [name, choose_prefetch(store, options.prefetch, name) or "none"]
    return {
        "attention and embeddings": loaded_bytes(store, compute, skipped_names(options)),
        "neurons": slots * store.bundles.bundle_bytes * config.num_layers,
        "buffers": _buffer_bytes(store, options),
        "predictor": sum(predictor_bytes(store, name, compute) for name in predictors),
        "program": program_bytes(options.loaders),
    }


def kv_cache_bytes(store: Store, num_seqs: int, max_length: int) -> int:
    """Of B sequences up to a length, float32."""
    config = store.config
    return 2 * config.num_layers * num_seqs * config.d_model * capacity_for(max_length) * np.dtype(np.float32).itemsize


def skipped_names(options: EngineOptions) -> frozenset[str]:
    """Resident tensors that are streamed instead."""
    return STREAMED_NAMES if options.ffn == "naive" else frozenset()


def slots_within(store: Store, options: EngineOptions, limit: int, num_seqs: int, max_length: int) -> int:
    """Neurons of each layer that a cache may hold for the run to stay within `limit` bytes.

    Raises:
      InflashError: not even a hundredth of the neurons would fit.
    """
    parts = {**memory_parts(store, options), "program": program_bytes(options.loaders, from_nothing=True)}
    rest = sum(size for name, size in parts.items() if name != "neurons") + kv_cache_bytes(store, num_seqs, max_length)
    slots = (limit - rest) // (store.bundles.bundle_bytes * store.config.num_layers)
    least = max(1, store.config.d_ff // 100)
    if slots < least:
        needed = rest + least * store.bundles.bundle_bytes * store.config.num_layers
        raise InflashError(
            f"memory: the least that would do is {needed / 2**20:.0f} MiB, found a limit of {limit / 2**20:.0f} MiB"
        )
    return min(slots, store.config.d_ff)


def _buffer_bytes(store: Store, options: EngineOptions) -> int:
    """What weights stream through: blocks of neurons but in resident mode, and two layers' attention in naive mode."""
    bundles = store.bundles
    blocks = 0 if options.ffn == "resident" else STREAM_BUFFERS * min(STREAM_BLOCK_BYTES, bundles.layer_bytes)
    attention = 2 * 4 * store.config.d_model * bundles.row_bytes if options.ffn == "naive" else 0
    return blocks + attention
