"""Where feed-forward neurons come from: streamed in blocks, or resident; `cached_feed_forward` is the third. One interface for all.

Axes: T tokens of a tile (the sequences of a decoding step, or a chunk of a prompt), D d_model, F d_ff.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ..kernels.compilation import jit
from ..kernels.sparse_ffn import block_ffn, observed_block_ffn
from ..storage.store import Store
from .block_stream import BlockStream
from .loader_pool import LoaderPool
from .neuron_rows import NeuronRows
from .plan import RESIDENT, STREAMED, Plan
from .slab import Slab, SlabPlan
from .trace import BLOCK, recorder
from .weights import aligned_empty, on_device

_block = jit(block_ffn, static_argnames=("compute_dtype",))
_observed_block = jit(observed_block_ffn, static_argnames=("compute_dtype",))
_columns = jit(lambda predicted, start, length: jax.lax.dynamic_slice_in_dim(predicted, start, length, 1), static_argnums=2)


def _dense_ffn(accumulator, ffn_in, up, down, up_bias, predicted, *, compute_dtype):
    return block_ffn(accumulator, ffn_in, up, down, up_bias, up.shape[0], predicted, compute_dtype=compute_dtype)


_dense = jit(_dense_ffn, static_argnames=("compute_dtype",))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Some tokens at the door of a layer's feed-forward block.

    Attributes:
      residual: [T, D] f32, what the neurons are added to.
      ffn_in: [T, D] f32, what they see.
      active: [T] bool, on the host: tokens that matter; the others are padding.
      predicted: [T, F] bool, the neurons that each token may use; None: all. The cache needs it.
      guessed: [T, F] bool, the neurons that the next layer will likely need; None: no guess.
    """

    residual: jax.Array
    ffn_in: jax.Array
    active: np.ndarray
    predicted: jax.Array | None = None
    guessed: jax.Array | None = None


Passing = Callable[[int, int, NeuronRows], None]
"""Is shown each block of a layer while its rows are in memory: its first neuron, their number, and the rows."""


class FeedForward(Protocol):
    """Adds a layer's neurons to the residual stream."""

    def bind(self, slab: Slab, pool: LoaderPool) -> None:
        """Called once, when the slab and the loaders are there."""
        ...

    def add_neurons(self, layer: int, tiles: Sequence[Tile]) -> list[jax.Array]:
        """The tiles' residuals [T, D] with the layer's neurons added."""
        ...

    def warm_up(self, tile: Tile) -> None:
        """Compiles what tiles of this shape need, without reading anything."""
        ...


class StreamedFeedForward:
    """Every neuron, read in order in blocks, for all tiles at once: prompts, and decoding steps where nothing is predicted.

    The stream is cyclic where steps and prompts go through the same layers: it then reads ahead into the next one.
    """

    def __init__(self, store: Store, slab: SlabPlan, up_bias: Sequence[np.ndarray], compute: np.dtype, plan: Plan) -> None:
        self._compute, self._d_ff, self._trace = compute, store.config.d_ff, recorder()
        self._length = block_rows(store, plan.block_bytes)
        self._blocks = -(-self._d_ff // self._length)
        with slab.in_one_piece():
            self._buffers = [NeuronRows(slab, store.bundles, self._length) for _ in range(plan.block_buffers)]
        steps = plan.layers(STREAMED)
        prompts = [layer for layer, way in enumerate(plan.ffn) if way != RESIDENT]
        self._of_prompts = [layer * self._blocks + block for layer in prompts for block in range(self._blocks)]
        self._planned = frozenset(steps)
        self._orders = {frozenset(prompts): self._of_prompts}
        self._again = True
        self._of_steps = self._order_of(self._planned)
        padding = self._blocks * self._length - self._d_ff
        self._padding = padding
        blocks = [np.pad(bias, (0, padding)).reshape(self._blocks, self._length) for bias in up_bias]
        self._block_bias = [[on_device(block) for block in rows] for rows in blocks]

    def bind(self, slab: Slab, pool: LoaderPool) -> None:
        for buffer in self._buffers:
            buffer.bind(slab)

        # Not `self`, which holds the stream: only a garbage collection would end that ring, and the slab's memory with it.
        offsets, length = [rows.offsets for rows in self._buffers], self._length
        counts = [self._count(block) for block in range(self._blocks)]

        def load(item: int, buffer: int):
            layer, block = divmod(item, len(counts))
            return [pool.read_range(layer, block * length, counts[block], 0, offsets[buffer])]

        cyclic = self._of_steps is self._of_prompts
        self._stream = BlockStream(pool, load, items=self._of_prompts, num_buffers=len(offsets), cyclic=cyclic)

    def _order_of(self, layers: frozenset[int]) -> list[int]:
        if layers not in self._orders:
            self._orders[layers] = [layer * self._blocks + block for layer in sorted(layers) for block in range(self._blocks)]
        return self._orders[layers]

    def stream_in_steps(self, layers: frozenset[int], *, again: bool) -> None:
        """The next step streams these layers besides those of the plan; `again`: so will the step after it, most likely."""
        self._of_steps, self._again = self._order_of(self._planned | layers), again

    def add_step(self, layer: int, tile: Tile) -> jax.Array:
        """`add_neurons` for a decoding step."""
        self._stream.follow(self._of_steps, cyclic=self._again)
        (total,) = self._add(layer, [tile])
        return total

    def add_neurons(self, layer: int, tiles: Sequence[Tile], passing: Passing | None = None) -> list[jax.Array]:
        self._follow_prompts()
        return self._add(layer, tiles, passing)

    def _follow_prompts(self) -> None:
        self._stream.follow(self._of_prompts, cyclic=self._of_steps is self._of_prompts)

    def _add(self, layer: int, tiles: Sequence[Tile], passing: Passing | None = None) -> list[jax.Array]:
        sums = [tile.residual for tile in tiles]
        masks = self._padded_masks(tiles)
        for block in range(self._blocks):
            buffer = self._stream.take(layer * self._blocks + block)
            with self._trace.span(BLOCK, layer, block):
                for number, tile in enumerate(tiles):
                    arguments = self._block_arguments(layer, block, buffer, masks[number])
                    sums[number] = self._add_block(sums[number], tile, *arguments)
            if passing is not None:
                passing(block * self._length, self._count(block), self._buffers[buffer])
            self._stream.give_back(buffer, sums[-1])
        return sums

    def observe_neurons(self, layer: int, tiles: Sequence[Tile]) -> tuple[list[jax.Array], list[np.ndarray]]:
        """`add_neurons`, and which neurons each token activates, predicted or not: [T, F] bool for each tile."""
        self._follow_prompts()
        sums = [tile.residual for tile in tiles]
        active = [np.empty((len(tile.active), self._d_ff), bool) for tile in tiles]
        masks = self._padded_masks(tiles)
        for block in range(self._blocks):
            buffer = self._stream.take(layer * self._blocks + block)
            seen = []
            for number, tile in enumerate(tiles):
                *rows, count, mask = self._block_arguments(layer, block, buffer, masks[number])
                sums[number], observed = _observed_block(
                    sums[number], tile.ffn_in, *rows, np.int32(count), mask, compute_dtype=self._compute
                )
                seen.append(observed)
            self._stream.give_back(buffer, sums[-1])
            columns = slice(block * self._length, block * self._length + self._count(block))
            for rows, observed in zip(active, seen, strict=True):
                rows[:, columns] = np.asarray(observed)[:, : self._count(block)]
        return sums, active

    def _add_block(
        self, total: jax.Array, tile: Tile, up: jax.Array, down: jax.Array, bias: jax.Array, count: int, mask: jax.Array | None
    ) -> jax.Array:
        if count == self._length:  # known when it is compiled, which spares many tokens a copy of the block
            return _dense(total, tile.ffn_in, up, down, bias, mask, compute_dtype=self._compute)
        return _block(total, tile.ffn_in, up, down, bias, np.int32(count), mask, compute_dtype=self._compute)

    def _padded_masks(self, tiles: Sequence[Tile]) -> list[jax.Array | None]:
        return [None if tile.predicted is None else self._padded(tile.predicted) for tile in tiles]

    def _padded(self, predicted: jax.Array) -> jax.Array:
        return jnp.pad(predicted, ((0, 0), (0, self._padding))) if self._padding else predicted

    def _block_arguments(self, layer: int, block: int, buffer: int, mask: jax.Array | None) -> tuple:
        rows = self._buffers[buffer]
        whole = mask is None or self._blocks == 1
        columns = mask if whole else _columns(mask, np.int32(block * self._length), self._length)
        return rows.up, rows.down, self._block_bias[layer][block], self._count(block), columns

    def warm_up(self, tile: Tile) -> None:
        (mask,) = self._padded_masks([tile])
        for block in {0, self._blocks - 1}:  # whole ones, and the last
            self._add_block(tile.residual, tile, *self._block_arguments(0, block, 0, mask))

    def row_s(self, tile: Tile) -> float:
        """Seconds that a neuron takes to compute with for tiles of this shape, nothing read; compiled before."""
        arguments = self._block_arguments(0, 0, 0, self._padded_masks([tile])[0])
        return shortest_s(lambda: self._add_block(tile.residual, tile, *arguments)) / self._count(0)

    def up_rows(self, layer: int) -> np.ndarray:
        """[F, D] the layer's up projection in the dtype of products; for the exact predictor, before the run."""
        self._follow_prompts()
        rows = aligned_empty((self._d_ff, self._buffers[0].up.shape[1]), self._compute)
        for block in range(self._blocks):
            buffer = self._stream.take(layer * self._blocks + block)
            up = self._buffers[buffer].up
            rows[block * self._length :][: self._count(block)] = np.asarray(up)[: self._count(block)]
            self._stream.give_back(buffer, up)
        return rows

    def _count(self, block: int) -> int:
        return min(self._length, self._d_ff - block * self._length)


def shortest_s(call: Callable[[], jax.Array]) -> float:
    """Of a few calls, until their result is there."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        call().block_until_ready()
        times.append(time.perf_counter() - began)
    return min(times)


def block_rows(store: Store, block_bytes: int) -> int:
    """Neurons of a streamed block."""
    return max(1, min(store.config.d_ff, block_bytes // store.bundles.bundle_bytes))


class ResidentFeedForward:
    """Every neuron of some layers in memory for the whole run, as if the model fitted."""

    def __init__(
        self, store: Store, slab: SlabPlan, up_bias: Sequence[np.ndarray], compute: np.dtype, layers: Sequence[int]
    ) -> None:
        self._compute, self._d_ff = compute, store.config.d_ff
        self._layers = {layer: NeuronRows(slab, store.bundles, self._d_ff) for layer in layers}
        self._bias = {layer: on_device(up_bias[layer]) for layer in layers}

    def bind(self, slab: Slab, pool: LoaderPool) -> None:
        for layer, rows in self._layers.items():
            rows.bind(slab)
            pool.wait(pool.read_range(layer, 0, self._d_ff, 0, rows.offsets))

    def add_neurons(self, layer: int, tiles: Sequence[Tile]) -> list[jax.Array]:
        rows = self._layers[layer]
        return [
            _dense(tile.residual, tile.ffn_in, rows.up, rows.down, self._bias[layer], tile.predicted, compute_dtype=self._compute)
            for tile in tiles
        ]

    def warm_up(self, tile: Tile) -> None:
        self.add_neurons(next(iter(self._layers)), [tile])
