import numpy as np
import pytest
from paged import random_cache, random_tables, spoil

from inflash.kernels import attention, reference
from inflash.kernels.compilation import jit

SHAPES = [
    (1, 4, 64, 32, 16),
    (3, 3, 50, 16, 5),
    (5, 2, 33, 20, 33),
    (8, 12, 128, 8, 32),
]  # B, H, positions, head_dim, size of a block
TOLERANCE = 1e-5  # float32 sums of values of size 1, weighted with shares that add up to 1


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_decode_agrees_with_reference(rng, shape):
    batch, num_heads, capacity, head_dim, size = shape
    tables, num_blocks = random_tables(rng, batch, capacity, size)
    query, keys, values = (
        normal(rng, batch, num_heads, head_dim),
        *(random_cache(rng, num_heads, num_blocks, size, head_dim) for _ in "kv"),
    )
    lengths = rng.integers(1, capacity + 1, batch, dtype=np.int32)
    expected = reference.attend_decode(query, keys, values, tables, lengths)
    found = jit(attention.attend_decode)(query, keys, values, tables, lengths)
    np.testing.assert_allclose(np.asarray(found), expected, atol=TOLERANCE)


@pytest.mark.parametrize("num_positions", [16, 27, 32, 64])
def test_decode_never_reads_beyond_num_positions(rng, num_positions):
    tables, num_blocks = random_tables(rng, 2, 64, 8, spare=0)
    query, keys, values = normal(rng, 2, 4, 16), *(random_cache(rng, 4, num_blocks, 8, 16) for _ in "kv")
    lengths = np.asarray([1, num_positions], np.int32)
    expected = reference.attend_decode(query, keys, values, tables, lengths)
    for table in tables:
        spoil(keys, table, num_positions)
        spoil(values, table, num_positions)
    attend = jit(attention.attend_decode, static_argnames="num_positions")
    found = attend(query, keys, values, tables, lengths, num_positions=num_positions)
    np.testing.assert_allclose(np.asarray(found), expected, atol=TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_append_decode_writes_one_position_a_sequence(rng, shape):
    """One beyond its table, or without a block, is dropped, not moved."""
    batch, num_heads, capacity, head_dim, size = shape
    tables, num_blocks = random_tables(rng, batch, capacity, size)
    cache, new = random_cache(rng, num_heads, num_blocks, size, head_dim), normal(rng, batch, num_heads, head_dim)
    positions = rng.integers(0, capacity, batch, dtype=np.int32)
    positions[0] = tables.shape[1] * size
    tables[-1] = num_blocks
    found = jit(attention.append_decode)(cache, new, tables, positions)
    np.testing.assert_array_equal(np.asarray(found), reference.append_decode(cache, new, tables, positions))


@pytest.mark.parametrize("start,count", [(0, 16), (0, 5), (7, 16), (40, 10), (47, 3), (49, 1), (45, 16), (3, 0)])
def test_append_chunk_writes_real_tokens_only(rng, start, count):
    tables, num_blocks = random_tables(rng, 3, 50, 10)
    cache, new = random_cache(rng, 2, num_blocks, 10, 16), normal(rng, 16, 2, 16)
    found = jit(attention.append_chunk)(cache, new, tables[1], np.int32(start), np.int32(count))
    np.testing.assert_array_equal(np.asarray(found), reference.append_chunk(cache, new, tables[1], start, count))


@pytest.mark.parametrize("start,count", [(0, 16), (0, 5), (7, 16), (40, 10), (49, 1)])
def test_chunk_agrees_with_reference(rng, start, count):
    tables, num_blocks = random_tables(rng, 3, 50, 10)
    query, keys, values = normal(rng, 16, 2, 16), *(random_cache(rng, 2, num_blocks, 10, 16) for _ in "kv")
    expected = reference.attend_chunk(query, keys, values, tables[2], start, count)
    found = np.asarray(jit(attention.attend_chunk)(query, keys, values, tables[2], np.int32(start)))
    np.testing.assert_allclose(found[:count], expected, atol=TOLERANCE)
    assert np.isfinite(found).all()


def test_chunk_never_reads_beyond_num_positions(rng):
    tables, num_blocks = random_tables(rng, 2, 50, 10)
    query, keys, values = normal(rng, 8, 2, 16), *(random_cache(rng, 2, num_blocks, 10, 16) for _ in "kv")
    expected = reference.attend_chunk(query, keys, values, tables[0], 4, 8)
    for cache in (keys, values):
        spoil(cache, tables[0], 16)
        cache[:, tables[1]] = np.nan
    attend = jit(attention.attend_chunk, static_argnames="num_positions")
    found = attend(query, keys, values, tables[0], np.int32(4), num_positions=16)
    np.testing.assert_allclose(np.asarray(found), expected, atol=TOLERANCE)
