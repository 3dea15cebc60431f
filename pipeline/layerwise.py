"""A model over many windows of text, one layer at a time: for models of any size, whose layers need not be in memory together.

Axes: W windows of a group, C tokens of a window, T tokens of a chunk, D d_model, F d_ff, V vocabulary.

Decoding goes through all layers for a token. Here all text goes through a layer before the next one is read, so that memory holds one
layer's attention, a few blocks of neurons, and one window's keys and values; hidden states wait on disk, the caller's to keep.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import jax
import numpy as np

from ..storage.store import Store
from .engine import Engine
from .feed_forward import Tile
from .fixed_shapes import Chunk, split_prompt
from .kv_cache import KVCache
from .options import EngineOptions
from .predictors import LayerPredictor
from .weights import on_device, zeros

GROUP_TOKENS = 2048
"""Tokens for which a layer's neurons are streamed once: enough that computing takes longer than reading."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOutput:
    """What a layer did to some windows.

    Attributes:
      hidden: [W, C, D] f32, its output.
      ffn_in: [W, C, D] f32, what its neurons read.
      active: [W, C, F] bool, the neurons that the ReLU let through, in the order of the store.
    """

    hidden: np.ndarray
    ffn_in: np.ndarray
    active: np.ndarray


class LayerwisePass:
    """A context manager over its own loaders. Layers are to be taken in ascending order, as often as wanted.

    Attributes:
      store: the model.
      engine: what it computes with.
      group: windows to give to `run` at once.
    """

    def __init__(
        self, store: Store, context: int, *, compute_dtype: str = "auto", loaders: int = 1, queue_depth: int = 128
    ) -> None:
        """Starts the loaders.

        Raises:
          InflashError: even one layer does not fit into memory.
        """
        self.store = store
        options = EngineOptions(ffn="naive", compute_dtype=compute_dtype, loaders=loaders, queue_depth=queue_depth)
        self.engine = Engine(store, options)
        assert self.engine.neurons.streamed is not None
        self._ffn = self.engine.neurons.streamed
        self.group = max(1, GROUP_TOKENS // context)
        self._kv_cache = KVCache(store.config, self.engine.shape, 1, context, num_layers=1)
        self._newest = zeros((1,))  # what was last computed with attention weights

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """[W, C] int32 to the first layer's input, [W, C, D] f32."""
        rows = []
        for window in token_ids:
            for chunk in split_prompt(0, window):
                positions = np.arange(chunk.start, chunk.start + len(chunk.token_ids), dtype=np.int32)
                rows.append(np.asarray(self.engine.matrices.embed(chunk.token_ids, positions))[: chunk.count])
        return np.concatenate(rows).reshape(*token_ids.shape, -1)

    @contextmanager
    def attention(self, layer: int) -> Iterator[dict[str, jax.Array]]:
        """The layer's attention weights in memory, for `run`."""
        weights = self.engine.matrices.take_attention(layer)
        try:
            yield weights
        finally:
            self.engine.matrices.give_back_attention(layer, self._newest)

    def run(
        self,
        layer: int,
        weights: dict[str, jax.Array],
        hidden: np.ndarray,
        predictor: LayerPredictor | None = None,
        before: np.ndarray | None = None,
    ) -> LayerOutput:
        """A group of windows through a layer.

        Args:
          layer: its number.
          weights: of `attention`.
          hidden: [W, C, D] f32, its input.
          predictor: each token's neurons are those that it names; None: all.
          before: [W, C, D] f32, what the predictor reads, where that is not this layer's own FFN input.
        """
        tiles = []
        for number, window in enumerate(hidden):
            for chunk in split_prompt(0, np.zeros(len(window), np.int32)):
                tile = self._attend(weights, window, chunk)
                if predictor is not None:
                    read = tile.ffn_in if before is None else _rows_of(chunk, before[number])
                    tile = replace(tile, predicted=predictor.predict(read))
                tiles.append(tile)
        self._newest = tiles[-1].residual
        outputs, active = self._ffn.observe_neurons(layer, tiles)
        outputs = [self.engine.after_ffn(layer, x) for x in outputs]
        counts = [int(tile.active.sum()) for tile in tiles]

        def joined(parts: list) -> np.ndarray:
            rows = [np.asarray(part)[:count] for part, count in zip(parts, counts, strict=True)]
            return np.concatenate(rows).reshape(*hidden.shape[:2], -1)

        return LayerOutput(hidden=joined(outputs), ffn_in=joined([tile.ffn_in for tile in tiles]), active=joined(active))

    def _attend(self, weights: dict[str, jax.Array], window: np.ndarray, chunk: Chunk) -> Tile:
        """A chunk of one window [C, D] through attention; chunks of a window follow each other."""
        residual, ffn_in = self._kv_cache.attend_chunk(0, _rows_of(chunk, window), weights, chunk)
        return Tile(residual=residual, ffn_in=ffn_in, active=np.arange(len(chunk.token_ids)) < chunk.count)

    def logits(self, windows: list[np.ndarray]) -> list[np.ndarray]:
        """From the last layer's outputs [C, D], each, to logits [C, V] f32; the head is streamed once for all of them."""
        chunks = [(number, chunk) for number, x in enumerate(windows) for chunk in split_prompt(0, np.zeros(len(x), np.int32))]
        rows = self.engine.matrices.logits([_rows_of(chunk, windows[number]) for number, chunk in chunks])
        parts: list[list[np.ndarray]] = [[] for _ in windows]
        for (number, chunk), values in zip(chunks, rows, strict=True):
            parts[number].append(np.asarray(values)[: chunk.count])
        return [np.concatenate(part) for part in parts]

    def up_rows(self, layer: int) -> np.ndarray:
        """[F, D] the layer's up projection, neurons in the order of the store."""
        return self._ffn.up_rows(layer)

    def up_bias(self, layer: int) -> np.ndarray:
        """[F] f32, neurons in the order of the store."""
        return self.engine.weights.up_bias[layer]

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> "LayerwisePass":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _rows_of(chunk: Chunk, window: np.ndarray) -> jax.Array:
    """[T, D] on the device: the chunk's rows of a window [C, D], then zeros."""
    rows = window[chunk.start : chunk.start + chunk.count]
    return on_device(np.pad(rows, ((0, len(chunk.token_ids) - len(rows)), (0, 0))))
