"""Where attention matrices and the output head come from: memory, or flash, for every token anew.

Axes: D d_model, V vocabulary, E embed_dim, B rows of a batch.
"""

import os
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np

from ..kernels.compilation import jit
from ..kernels.decoder_layer import LayerShape, embed, final_hidden, logits
from ..kernels.linear import linear
from ..storage.layout import dtype_of, resident_specs
from ..storage.resident import ByteRange, byte_ranges
from ..storage.store import Store
from .loader_pool import LoaderPool
from .matrix_stream import MatrixStream, StreamedMatrix
from .plan import ATTENTION_OUT, Plan, head_block_rows
from .slab import Slab, SlabPlan
from .weights import ModelWeights, on_device

_embed = jit(embed, static_argnames=("position_offset", "compute_dtype"))
_logits = jit(logits, unrolled=False, static_argnames="shape")
_final_hidden = jit(final_hidden, static_argnames="shape")
_linear = jit(linear, unrolled=False, static_argnames="compute_dtype")

_HEADS_WAY = ATTENTION_OUT


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
    """Some of attention's matrices, or the head, or both are streamed, each kind through buffers of its own.

    The head, in blocks, goes through those of the output projection. The few rows of the token embedding that a step needs are read by the
    engine itself where the head is streamed.
    """

    def __init__(self, store: Store, slab: SlabPlan, weights: ModelWeights, shape: LayerShape, plan: Plan) -> None:
        super().__init__(store, weights, shape)
        self._store, self._head, self._dtype = store, plan.streamed_head, dtype_of(store.dtype)
        layers = {
            name: [layer for layer, streamed in enumerate(ways) if streamed] for name, ways in plan.streamed_matrices.items()
        }
        self._numbers = {name: {layer: number for number, layer in enumerate(some)} for name, some in layers.items()}
        matrices = {name: [self._matrix(name, layer) for layer in some] for name, some in layers.items()}
        self._first_head_block = len(matrices[_HEADS_WAY])
        if self._head:
            matrices[_HEADS_WAY] += self._head_blocks()
        with slab.in_one_piece():
            self._streams = {name: MatrixStream(slab, self._dtype, some) for name, some in matrices.items() if some}
        self.files = sorted({file for stream in self._streams.values() for file in stream.files})

    def bind(self, slab: Slab, pool: LoaderPool) -> None:
        for stream in self._streams.values():
            stream.bind(slab, pool, self.files)

    def embed(self, token_ids: np.ndarray, positions: np.ndarray) -> jax.Array:
        if not self._head:
            return super().embed(token_ids, positions)
        rows = np.stack([self._token_row(int(token)) for token in token_ids])
        tables = {**self._weights.embeddings, "tokens": on_device(rows)}
        return _embed(np.arange(len(rows), dtype=np.int32), positions, tables, self._offset, compute_dtype=self._compute)

    def take_attention(self, layer: int) -> dict[str, jax.Array]:
        matrices = {name: self._streams[name].take(numbers[layer]) for name, numbers in self._numbers.items() if layer in numbers}
        return {**self._weights.layers[layer], **matrices}

    def give_back_attention(self, layer: int, result: jax.Array) -> None:
        streams = [self._streams[name] for name, numbers in self._numbers.items() if layer in numbers]
        if streams:  # with so few buffers these must be free before the layer after the next is asked for
            result.block_until_ready()
        for stream in streams:
            stream.give_back(result)

    def logits(self, hidden: Sequence[jax.Array]) -> list[jax.Array]:
        if not self._head:
            return super().logits(hidden)
        ready = [_final_hidden(x, self._weights.embeddings, self._shape) for x in hidden]
        parts: list[list[np.ndarray]] = [[] for _ in hidden]
        for block, rows in enumerate(self._block_rows):
            matrix = self._streams[_HEADS_WAY].take(self._first_head_block + block)
            for number, x in enumerate(ready):
                parts[number].append(np.asarray(_linear(x, matrix, compute_dtype=self._compute))[:, :rows])
            self._streams[_HEADS_WAY].give_back(ready[-1])
        return [on_device(np.concatenate(part, axis=1)) for part in parts]

    def examples(self) -> list[dict[str, jax.Array]]:
        kinds: dict[frozenset[str], dict[str, jax.Array]] = {}
        for layer, weights in enumerate(self._weights.layers):
            streamed = {name: numbers[layer] for name, numbers in self._numbers.items() if layer in numbers}
            kinds[frozenset(streamed)] = {**weights, **{name: self._streams[name].example(n) for name, n in streamed.items()}}
        return list(kinds.values())

    def warm_up(self, x: jax.Array) -> None:
        if not self._head:
            super().warm_up(x)
            return
        nothing = np.zeros(len(x), np.int32)
        self.embed(nothing, nothing)
        hidden = _final_hidden(x, self._weights.embeddings, self._shape)
        _linear(hidden, self._streams[_HEADS_WAY].example(self._first_head_block), compute_dtype=self._compute)

    def _matrix(self, name: str, layer: int) -> StreamedMatrix:
        specs, folder = resident_specs(self._store.config, layer, self._store.dtype), self._store.resident_folder(layer)
        rows, columns = next(spec.shape for spec in specs if spec.name == name)
        return StreamedMatrix(shape=(rows, columns), ranges=byte_ranges(folder, specs, name))

    def _head_blocks(self) -> list[StreamedMatrix]:
        """The head in blocks as large as an output projection."""
        config = self._store.config
        specs, folder = resident_specs(config, None, self._store.dtype), self._store.resident_folder(None)
        self._token_ranges = byte_ranges(folder, specs, "tokens")
        head = self._token_ranges if config.tied_head else byte_ranges(folder, specs, "head")
        most = head_block_rows(config)
        self._block_rows = [min(most, config.vocab_size - first) for first in range(0, config.vocab_size, most)]
        shape, size = (most, config.embed_dim), config.embed_dim * self._dtype.itemsize
        ends = np.cumsum(self._block_rows).tolist()
        return [
            StreamedMatrix(shape=shape, ranges=_clip(head, (end - rows) * size, end * size))
            for rows, end in zip(self._block_rows, ends, strict=True)
        ]

    def _token_row(self, token: int) -> np.ndarray:
        size = self._store.config.embed_dim * self._dtype.itemsize
        start = min(token, self._store.config.vocab_size - 1) * size
        (piece,) = _clip(self._token_ranges, start, start + size)
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
