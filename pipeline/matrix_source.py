"""Where attention matrices and the output head come from: memory, or flash, for every token anew.

Axes: D d_model, V vocabulary, E embed_dim, B rows of a batch.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from ..kernels.compilation import jit
from ..kernels.decoder_layer import LayerShape, embed, final_hidden, logits
from ..kernels.linear import linear
from ..storage.layout import dtype_of, resident_specs
from ..storage.resident import ByteRange, byte_ranges
from ..storage.store import Store
from .block_stream import BlockStream
from .loader_pool import LoaderPool
from .plan import Plan
from .slab import Slab, SlabPlan
from .weights import ModelWeights, alias, on_device

_embed = jit(embed, static_argnames=("position_offset", "compute_dtype"))
_logits = jit(logits, static_argnames="shape")
_final_hidden = jit(final_hidden, static_argnames="shape")
_linear = jit(linear, static_argnames="compute_dtype")


class MatrixSource(Protocol):
    """Hands out what is not a feed-forward neuron."""

    def embed(self, token_ids: np.ndarray, positions: np.ndarray) -> jax.Array:
        """[B] int32 each to the residual stream's start [B, D]."""
        ...

    def take_attention(self, layer: int) -> dict[str, jax.Array]:
        """The layer's attention and norm weights; `give_back_attention` follows."""
        ...

    def give_back_attention(self, layer: int, result: jax.Array) -> None:
        """Everything that read the layer's weights is computed once `result` is."""
        ...

    def logits(self, hidden: Sequence[jax.Array]) -> list[jax.Array]:
        """From the last layer's outputs [B, D], each, to logits [B, V]."""
        ...

    def examples(self) -> list[dict[str, jax.Array]]:
        """Arrays like a layer's attention weights, one of each kind, for compiling kernels."""
        ...

    def warm_up(self, x: jax.Array) -> None:
        """Compiles what a batch shaped like x [B, D] needs."""
        ...


class ResidentMatrices:
    """The ordinary case: everything is in memory."""

    def __init__(self, store: Store, weights: ModelWeights, shape: LayerShape) -> None:
        self._weights, self._shape, self._compute = weights, shape, np.dtype(shape.compute_dtype)
        self._offset = store.config.position_offset

    def embed(self, token_ids: np.ndarray, positions: np.ndarray) -> jax.Array:
        return _embed(token_ids, positions, self._weights.embeddings, self._offset, compute_dtype=self._compute)

    def take_attention(self, layer: int) -> dict[str, jax.Array]:
        return self._weights.layers[layer]

    def give_back_attention(self, layer: int, result: jax.Array) -> None:
        pass

    def logits(self, hidden: Sequence[jax.Array]) -> list[jax.Array]:
        return [_logits(x, self._weights.embeddings, self._shape) for x in hidden]

    def examples(self) -> list[dict[str, jax.Array]]:
        return [self._weights.layers[0]]

    def warm_up(self, x: jax.Array) -> None:
        nothing = np.zeros(len(x), np.int32)
        self.embed(nothing, nothing)
        self.logits([x])


class StreamedMatrices(ResidentMatrices):
    """Some layers' attention, or the head, or both are streamed: a layer at a time into two buffers, and the head in blocks into the same.

    The few rows of the token embedding that a step needs are read by the engine itself where the head is streamed.
    """

    def __init__(self, store: Store, slab: SlabPlan, weights: ModelWeights, shape: LayerShape, plan: Plan) -> None:
        super().__init__(store, weights, shape)
        self._store, self._head = store, plan.streamed_head
        layers = [layer for layer, streamed in enumerate(plan.streamed_attention) if streamed]
        self._items = {layer: item for item, layer in enumerate(layers)}
        config, self._dtype = store.config, dtype_of(store.dtype)
        self._matrix_shapes = {"qkv": (3 * config.d_model, config.d_model), "attention_out": (config.d_model, config.d_model)}
        self._matrix_bytes = {name: int(np.prod(size)) * self._dtype.itemsize for name, size in self._matrix_shapes.items()}
        # A region of its own for each matrix keeps direct reads aligned; the head uses the largest.
        with slab.in_one_piece():
            self._regions = [{name: slab.reserve(size) for name, size in self._matrix_bytes.items()} for _ in range(2)]
        self._head_row_bytes = config.embed_dim * self._dtype.itemsize
        self._head_rows = min(config.vocab_size, self._matrix_bytes["qkv"] // self._head_row_bytes)
        self._head_blocks = -(-config.vocab_size // self._head_rows)
        self.files: list[Path] = []
        self._ranges = self._find_ranges()

    def bind(self, slab: Slab, pool: LoaderPool) -> None:
        self._buffers = [
            {name: alias(slab.array(region[name], size, self._dtype)) for name, size in self._matrix_shapes.items()}
            for region in self._regions
        ]
        head_shape = (self._head_rows, self._store.config.embed_dim)
        self._head_buffers = [alias(slab.array(region["qkv"], head_shape, self._dtype)) for region in self._regions]

        files, regions, ranges = self.files, self._regions, self._ranges  # not `self`, which holds the stream, see `feed_forward`

        def load(item: int, buffer: int):
            region = regions[buffer]
            return [pool.read_bytes(files.index(r.file), r.offset, r.length, region[name] + r.target) for name, r in ranges[item]]

        self._stream = BlockStream(pool, load, items=range(len(self._ranges)), num_buffers=2, cyclic=True)
        self._taken = 0

    def embed(self, token_ids: np.ndarray, positions: np.ndarray) -> jax.Array:
        if not self._head:
            return super().embed(token_ids, positions)
        rows = np.stack([self._token_row(int(token)) for token in token_ids])
        tables = {**self._weights.embeddings, "tokens": on_device(rows)}
        return _embed(np.arange(len(rows), dtype=np.int32), positions, tables, self._offset, compute_dtype=self._compute)

    def take_attention(self, layer: int) -> dict[str, jax.Array]:
        if layer not in self._items:
            return super().take_attention(layer)
        self._taken = self._stream.take(self._items[layer])
        return {**self._weights.layers[layer], **self._buffers[self._taken]}

    def give_back_attention(self, layer: int, result: jax.Array) -> None:
        if layer not in self._items:
            return
        # Two buffers only: the next layer's is in flight, so this one must be free before the one after it is asked for.
        result.block_until_ready()
        self._stream.give_back(self._taken, result)

    def logits(self, hidden: Sequence[jax.Array]) -> list[jax.Array]:
        if not self._head:
            return super().logits(hidden)
        ready = [_final_hidden(x, self._weights.embeddings, self._shape) for x in hidden]
        parts: list[list[np.ndarray]] = [[] for _ in hidden]
        for block in range(self._head_blocks):
            buffer = self._stream.take(len(self._items) + block)
            rows = min(self._head_rows, self._store.config.vocab_size - block * self._head_rows)
            for number, x in enumerate(ready):
                product = _linear(x, self._head_buffers[buffer], compute_dtype=self._compute)
                parts[number].append(np.asarray(product)[:, :rows])
            self._stream.give_back(buffer, ready[-1])
        return [on_device(np.concatenate(part, axis=1)) for part in parts]

    def examples(self) -> list[dict[str, jax.Array]]:
        resident = [weights for layer, weights in enumerate(self._weights.layers) if layer not in self._items]
        streamed = [{**self._weights.layers[layer], **self._buffers[0]} for layer in self._items]
        return resident[:1] + streamed[:1]

    def warm_up(self, x: jax.Array) -> None:
        if not self._head:
            super().warm_up(x)
            return
        nothing = np.zeros(len(x), np.int32)
        self.embed(nothing, nothing)
        hidden = _final_hidden(x, self._weights.embeddings, self._shape)
        _linear(hidden, self._head_buffers[0], compute_dtype=self._compute)

    def _find_ranges(self) -> list[list[tuple[str, ByteRange]]]:
        """What each item of the stream reads: the layers' matrices, then blocks of the head."""
        config = self._store.config
        items: list[list[tuple[str, ByteRange]]] = []
        for layer in self._items:
            specs, folder = resident_specs(config, layer, self._store.dtype), self._store.resident_folder(layer)
            items.append([(name, r) for name in self._matrix_shapes for r in byte_ranges(folder, specs, name)])
        if self._head:
            items += self._find_head()
        self.files = sorted({r.file for item in items for _, r in item})
        return items

    def _find_head(self) -> list[list[tuple[str, ByteRange]]]:
        config = self._store.config
        specs, folder = resident_specs(config, None, self._store.dtype), self._store.resident_folder(None)
        self._token_ranges = byte_ranges(folder, specs, "tokens")
        head = self._token_ranges if config.tied_head else byte_ranges(folder, specs, "head")
        block_bytes = self._head_rows * self._head_row_bytes
        total = config.vocab_size * self._head_row_bytes
        starts = range(0, total, block_bytes)
        return [[("qkv", piece) for piece in _clip(head, start, min(start + block_bytes, total))] for start in starts]

    def _token_row(self, token: int) -> np.ndarray:
        start = min(token, self._store.config.vocab_size - 1) * self._head_row_bytes
        (piece,) = _clip(self._token_ranges, start, start + self._head_row_bytes)
        descriptor = os.open(piece.file, os.O_RDONLY)
        try:
            return np.frombuffer(os.pread(descriptor, piece.length, piece.offset), self._dtype)
        finally:
            os.close(descriptor)


def _clip(ranges: Sequence[ByteRange], start: int, stop: int) -> list[ByteRange]:
    """The parts of a tensor's byte ranges that hold its bytes [start, stop), targets counted from `start`."""
    clipped = []
    for r in ranges:
        first, last = max(r.target, start), min(r.target + r.length, stop)
        if first < last:
            clipped.append(ByteRange(file=r.file, offset=r.offset + first - r.target, length=last - first, target=first - start))
    return clipped
