"""Keys and values of all layers in blocks that sequences of any length share, and attention over them.

Axes: B sequences, T tokens of a chunk of prompts, D d_model, H heads, N blocks, M blocks of a sequence's table.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ..kernels.compilation import jit
from ..kernels.decoder_layer import LayerShape, Weights, attention_chunk, attention_decode
from ..storage.model_config import ModelConfig
from .block_pool import BLOCK_SIZE, BlockPool, num_blocks_for
from .chunks import Chunk
from .fixed_shapes import capacity_for
from .weights import zeros


def _attend_places(
    x: jax.Array,
    weights: Weights,
    keys: jax.Array,
    values: jax.Array,
    places: jax.Array,
    shape: LayerShape,
    *,
    num_positions: int,
) -> tuple[jax.Array, ...]:
    """`attention_decode` with positions and tables in one array, see `KVCache.places`: each argument from NumPy costs a transfer."""
    return attention_decode(x, weights, keys, values, places[:, 1:], places[:, 0], shape, num_positions=num_positions)


def _attend_tokens(
    x: jax.Array, weights: Weights, keys: jax.Array, values: jax.Array, tables: jax.Array, places: jax.Array, shape: LayerShape
) -> tuple[jax.Array, ...]:
    """`attention_chunk` with a chunk's places, see `Chunk`."""
    pieces = places[2:].T
    num_pieces = jnp.sum(pieces[:, 3] > 0, dtype=jnp.int32)
    return attention_chunk(x, weights, keys, values, tables, places[0], places[1], pieces, num_pieces, shape)


_attention_decode = jit(
    _attend_places, unrolled=False, static_argnames=("shape", "num_positions"), donate_argnames=("keys", "values")
)
_attention_chunk = jit(_attend_tokens, unrolled=False, static_argnames="shape", donate_argnames=("keys", "values"))


def num_cache_blocks(num_seqs: int, max_length: int, num_positions: int | None = None) -> int:
    """N for B sequences: a power of two that holds so many positions, and no more than all need at their longest; None: just these."""
    most = num_seqs * num_blocks_for(capacity_for(max_length))
    return most if num_positions is None else min(most, 1 << (num_blocks_for(num_positions) - 1).bit_length())


class KVCache:
    """The cache of B sequences. Which blocks a sequence has is decided before it begins, for all that it may reach.

    Attributes:
      pool: the blocks.
      num_seqs, capacity: B, and the positions that a table has room for.
      num_cached: for each sequence how many positions of its prompt are there already: those that it shares, and later what has passed.
    """

    def __init__(
        self,
        config: ModelConfig,
        shape: LayerShape,
        num_seqs: int,
        max_length: int,
        *,
        num_blocks: int | None = None,
        num_layers: int | None = None,
    ) -> None:
        """Makes room, and shares it out.

        Args:
          config, shape: the model, and what its layers are compiled for.
          num_seqs, max_length: B, which may be 0, and the longest that a sequence can become.
          num_blocks: N; None: as many as let all sequences become so long.
          num_layers: that keep keys and values; None: the model's.
        """
        self._shape = shape
        self.num_seqs, self.capacity = num_seqs, capacity_for(max_length)
        self.pool = BlockPool(num_cache_blocks(num_seqs, max_length) if num_blocks is None else num_blocks)
        layers = range(config.num_layers if num_layers is None else num_layers)
        sizes = (config.num_heads, self.pool.num_blocks, BLOCK_SIZE, config.head_dim)
        self._keys, self._values = [zeros(sizes) for _ in layers], [zeros(sizes) for _ in layers]
        self._held: list[list[int]] = []
        self.share_out()

    @property
    def num_positions(self) -> int:
        """Of all blocks together."""
        return self.pool.num_blocks * BLOCK_SIZE

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in (*self._keys, *self._values))

    def clear(self) -> None:
        """Takes every sequence's blocks away; nothing of what they hold is found again."""
        self.pool = BlockPool(self.pool.num_blocks)
        self.num_cached = [0] * self.num_seqs
        self._held = [[] for _ in range(self.num_seqs)]
        self._tables = np.full((self.num_seqs, self.capacity // BLOCK_SIZE), self.pool.num_blocks, np.int32)

    def share_out(self) -> None:
        """Gives every sequence blocks of its own for all of its positions, in turn, as far as there are."""
        self.clear()
        for sequence in range(self.num_seqs):
            positions = min(self.capacity, self.pool.num_free * BLOCK_SIZE)
            self.admit(sequence, np.zeros(0, np.int32), positions)

    def admit(self, sequence: int, token_ids: np.ndarray, num_positions: int) -> bool:
        """Gives a sequence that has none its blocks, and says whether enough are free.

        What is admitted first is to be processed first: later prompts may share its blocks.

        Args:
          sequence: which, below B.
          token_ids: [T] int32, its prompt.
          num_positions: that it may reach.
        """
        taken = self.pool.take(token_ids, num_positions)
        if taken is None:
            return False
        self._held[sequence], self.num_cached[sequence] = taken
        self._tables[sequence, : len(taken[0])] = taken[0]
        return True

    def release(self, sequence: int) -> None:
        """Takes a sequence's blocks back."""
        self.pool.give_back(self._held[sequence])
        self._held[sequence] = []
        self._tables[sequence] = self.pool.num_blocks

    def tables(self) -> np.ndarray:
        """[B, M] int32: the sequences' blocks. The array is the caller's: it may be read after a sequence has ended."""
        return self._tables.copy()

    def places(self, positions: np.ndarray, active: np.ndarray) -> np.ndarray:
        """[B, 1 + M] int32: positions [B] int32, then tables; sequences that are not active [B] have no blocks: nothing is written."""
        places = np.empty((self.num_seqs, 1 + self._tables.shape[1]), np.int32)
        places[:, 0], places[:, 1:] = positions, self.pool.num_blocks
        places[active, 1:] = self._tables[active]
        return places

    def attend_step(
        self, layer: int, x: jax.Array, weights: Weights, places: np.ndarray, bound: int
    ) -> tuple[jax.Array, jax.Array]:
        """One token of every sequence through a layer's attention.

        Args:
          layer, weights: which.
          x: [B, D] f32.
          places: [B, 1 + M] int32, of the function of that name.
          bound: positions from there on are not looked at.

        Returns:
          residual and the FFN's input, [B, D] f32 each.
        """
        residual, ffn_in, self._keys[layer], self._values[layer] = _attention_decode(
            x, weights, self._keys[layer], self._values[layer], places, self._shape, num_positions=bound
        )
        return residual, ffn_in

    def attend_chunk(
        self, layer: int, x: jax.Array, weights: Weights, tables: np.ndarray, chunk: Chunk
    ) -> tuple[jax.Array, jax.Array]:
        """A chunk of prompts [T, D] through a layer's attention, `tables` [B, M]: residual and the FFN's input, [T, D] f32 each."""
        residual, ffn_in, self._keys[layer], self._values[layer] = _attention_chunk(
            x, weights, self._keys[layer], self._values[layer], tables, chunk.places, self._shape
        )
        return residual, ffn_in
