"""KV caches in blocks for tests. Axes: B sequences, H heads, N blocks, M blocks of a table."""

import numpy as np


def random_tables(rng: np.random.Generator, batch: int, capacity: int, size: int, spare: int = 2) -> tuple[np.ndarray, int]:
    """[B, M] int32, no block twice and in no order, and N, which is `spare` more than they name."""
    per_sequence = -(-capacity // size)
    num_blocks = batch * per_sequence + spare
    return rng.permutation(num_blocks)[: batch * per_sequence].reshape(batch, per_sequence).astype(np.int32), num_blocks


def random_cache(rng: np.random.Generator, num_heads: int, num_blocks: int, size: int, head_dim: int) -> np.ndarray:
    return rng.standard_normal((num_heads, num_blocks, size, head_dim)).astype(np.float32)


def spoil(cache: np.ndarray, table: np.ndarray, length: int) -> None:
    """Positions of one sequence from `length` on become NaN."""
    size = cache.shape[2]
    for position in range(length, len(table) * size):
        cache[:, table[position // size], position % size] = np.nan
