"""A model over many windows of text, one layer at a time: for models of any size, whose layers need not be in memory together.

Axes: W windows of a group, C tokens of a window, T tokens of a chunk, D d_model, F d_ff, V vocabulary.

Decoding goes through all layers for a token. Here all text goes through a layer before the next one is read, so that memory holds one
layer's attention, a few blocks of neurons, and a group's keys and values; hidden states wait on disk, the caller's to keep.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import jax
import numpy as np

from ..storage.store import Store
from .chunks import Chunk, cut, pack_prompts
from .engine import Engine
from .feed_forward import Tile
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
        self._kv_cache = KVCache(store.config, self.engine.shape, self.group, context, num_layers=1)
        self._newest = zeros((1,))  # what was last computed with attention weights

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """[W, C] int32 to the first layer's input, [W, C, D] f32."""
        embed = self.engine.matrices.embed
        rows = [np.asarray(embed(chunk.token_ids, chunk.positions))[: chunk.count] for chunk, _, _ in self._chunks(token_ids)]
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
        tiles, rows = [], hidden.reshape(-1, hidden.shape[2])
        for chunk, start, stop in self._chunks(np.zeros(hidden.shape[:2], np.int32)):
            tile = self._attend(weights, chunk, rows[start:stop])
            if predictor is not None:
                read = tile.ffn_in if before is None else _padded(before.reshape(rows.shape)[start:stop], len(chunk.token_ids))
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

    def _chunks(self, token_ids: np.ndarray) -> Iterator[tuple[Chunk, int, int]]:
        """Windows [W, C] int32, each a sequence of its own, in chunks; the rows of [W * C] that each holds, from `start` to `stop`."""
        start = 0
        for first in range(0, len(token_ids), self.group):  # the KV cache has room for so many
            windows = token_ids[first : first + self.group]
            for chunks in pack_prompts([(number, window, 0) for number, window in enumerate(windows)], windows.size):
                for chunk in chunks:
                    yield chunk, start, start + chunk.count
                    start += chunk.count

    def _attend(self, weights: dict[str, jax.Array], chunk: Chunk, rows: np.ndarray) -> Tile:
        """A chunk's rows [count, D] through attention; chunks of a group follow each other."""
        x = _padded(rows, len(chunk.token_ids))
        residual, ffn_in = self._kv_cache.attend_chunk(0, x, weights, self._kv_cache.tables(), chunk)
        return Tile(residual=residual, ffn_in=ffn_in, active=chunk.active)

    def logits(self, windows: list[np.ndarray]) -> list[np.ndarray]:
        """From the last layer's outputs [C, D], each, to logits [C, V] f32; the head is streamed once for all of them."""
        cuts = [(number, *part) for number, x in enumerate(windows) for part in cut(0, len(x))]
        rows = self.engine.matrices.logits([_padded(windows[number][start:stop], size) for number, start, stop, size in cuts])
        parts: list[list[np.ndarray]] = [[] for _ in windows]
        for (number, start, stop, _), values in zip(cuts, rows, strict=True):
            parts[number].append(np.asarray(values)[: stop - start])
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


def _padded(rows: np.ndarray, size: int) -> jax.Array:
    """[size, D] on the device: the rows, then zeros."""
    return on_device(np.pad(rows, ((0, size - len(rows)), (0, 0))))
