"""What an engine will hold in memory, by part, before there is one.

Axes: B sequences, C positions of the KV cache, D d_model, F d_ff, S slots.
"""

import numpy as np

from ..errors import InflashError
from ..storage.layout import dtype_of
from ..storage.store import Store
from .chunks import sizes_for
from .feed_forward import block_rows
from .fixed_shapes import CHUNK_SIZES, capacity_for
from .host_memory import available_bytes, check_fits, program_bytes
from .matrix_stream import MATRIX_BUFFERS
from .options import EngineOptions
from .plan import CACHED, RESIDENT, Plan, guessed_layers, head_block_rows, plan_from_options
from .predictors import predictor_memory_bytes
from .staging import is_staged
from .weights import compute_dtype, loaded_bytes

_LOGITS = 10  # [B, V] f32 each: those of a step, the pieces they come from, and seven or eight that sampling with a filter makes
_ATTENTION = 6  # of a chunk, [T, D] f32 each: what the compiled kernel says that it needs beside its results
_LONG_CHUNK_BYTES = 50 << 20  # what kernels for long chunks were seen to take beyond that, in runs of several sequences
_ACTIVATIONS = 5  # of a prompt's tokens at a time, [T, D] f32 each: input, residual, FFN input, sum, output


def memory_parts(store: Store, options: EngineOptions, plan: Plan) -> dict[str, int]:
    """Bytes by name. The KV cache comes on top where the plan does not say its size, see `kv_cache_bytes`."""
    compute = compute_dtype(options.compute_dtype, store.dtype)
    predictors = ((plan.predictor, plan.layers(CACHED)), (plan.prefetch, guessed_layers(plan)))
    return {
        "attention and embeddings": loaded_bytes(store, compute, plan.streamed_names),
        "neurons": sum(plan.slots) * store.bundles.bundle_bytes,
        "buffers": buffer_bytes(store, plan),
        "predictor": sum(predictor_memory_bytes(store, name, compute, layers) for name, layers in predictors if name),
        "activations": activation_bytes(store, plan),
        "KV cache": kv_cache_bytes(store, plan.kv_positions),
        "program": program_bytes(plan.loaders),
    }


def total_bytes(store: Store, options: EngineOptions, plan: Plan) -> int:
    """All that processes which are yet to start will hold."""
    parts = memory_parts(store, options, plan)
    return sum(parts.values()) - parts["program"] + program_bytes(plan.loaders, from_nothing=True)


def kv_cache_bytes(store: Store, num_positions: int) -> int:
    """Of so many positions, float32."""
    config = store.config
    return 2 * config.num_layers * num_positions * config.d_model * np.dtype(np.float32).itemsize


def fitting_positions(store: Store, wanted: int, least: int, *, given_back: int = 0) -> int:
    """Positions of a KV cache: as many as are wanted, halved until memory has room for them, but at least so many.

    Args:
      given_back: bytes that there will be besides.
    """
    while wanted > least and kv_cache_bytes(store, wanted) > available_bytes() + given_back:
        wanted = max(wanted // 2, least)
    return wanted


def check_kv_cache(store: Store, num_positions: int) -> None:
    """Raises InflashError, with the figures, where memory has no room for so many positions."""
    needed = {f"KV cache of {num_positions} tokens": kv_cache_bytes(store, num_positions)}
    check_fits(needed, "use a smaller --max-num-seqs or --max-model-len")


def activation_bytes(store: Store, plan: Plan) -> int:
    """What passes through the layers: of prompts, and of a decoding step."""
    config = store.config
    prompt = _ACTIVATIONS * plan.prompt_tokens * config.d_model
    attention = _ATTENTION * CHUNK_SIZES[-1] * config.d_model
    hidden = 2 * CHUNK_SIZES[-1] * max(block_rows(store, plan.block_bytes), config.d_ff if RESIDENT in plan.ffn else 0)
    logits = _LOGITS * max(plan.num_seqs, 1) * config.vocab_size
    long_chunks = _LONG_CHUNK_BYTES if len(sizes_for(max(plan.prompt_tokens, plan.kv_positions))) > 1 else 0
    return np.dtype(np.float32).itemsize * (prompt + max(attention, hidden, logits)) + long_chunks


def buffer_bytes(store: Store, plan: Plan) -> int:
    """What weights stream through: blocks of neurons where some are not resident, and two of each matrix of which some are not."""
    config, bundles = store.config, store.bundles
    streams = any(way != RESIDENT for way in plan.ffn)
    block = block_rows(store, plan.block_bytes) * bundles.bundle_bytes
    blocks = plan.block_buffers * block if streams else 0
    if is_staged(bundles.row_bytes, block):  # in every loader, at worst
        blocks *= 1 + plan.loaders
    square = config.d_model * bundles.row_bytes
    out = max(square if any(plan.streamed_out) else 0, head_block_bytes(store) if plan.streamed_head else 0)
    return blocks + MATRIX_BUFFERS * (out + (3 * square if any(plan.streamed_qkv) else 0))


def head_block_bytes(store: Store) -> int:
    """Of a block of the head that is streamed."""
    return head_block_rows(store.config) * store.config.embed_dim * dtype_of(store.dtype).itemsize


def slots_within(store: Store, options: EngineOptions, limit: int, num_seqs: int, max_length: int) -> int:
    """Neurons of each layer that a cache may hold for the run to stay within `limit` bytes.

    Raises:
      InflashError: not even a hundredth of the neurons would fit.
    """
    plan = plan_from_options(store, options)
    parts = {**memory_parts(store, options, plan), "program": program_bytes(options.loaders, from_nothing=True)}
    rest = sum(size for name, size in parts.items() if name != "neurons") + kv_cache_bytes(
        store, num_seqs * capacity_for(max_length)
    )
    slots = (limit - rest) // (store.bundles.bundle_bytes * store.config.num_layers)
    least = max(1, store.config.d_ff // 100)
    if slots < least:
        needed = rest + least * store.bundles.bundle_bytes * store.config.num_layers
        raise InflashError(
            f"memory: the least that would do is {needed / 2**20:.0f} MiB, found a limit of {limit / 2**20:.0f} MiB"
        )
    return min(slots, store.config.d_ff)
