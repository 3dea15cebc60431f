import numpy as np
import pytest

from inflash.kernels import attention, reference
from inflash.kernels.compilation import jit

SHAPES = [(1, 4, 64, 32), (3, 3, 50, 16), (5, 2, 33, 20), (8, 12, 128, 8)]  # B, H, C, head_dim
TOLERANCE = 1e-5  # float32 sums of values of size 1, weighted with shares that add up to 1


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_decode_agrees_with_reference(rng, shape):
    batch, num_heads, capacity, head_dim = shape
    query, keys, values = normal(rng, batch, num_heads, head_dim), normal(rng, *shape), normal(rng, *shape)
    lengths = rng.integers(1, capacity + 1, batch, dtype=np.int32)
    expected = reference.attend_decode(query, keys, values, lengths)
    found = jit(attention.attend_decode)(query, keys, values, lengths)
    np.testing.assert_allclose(np.asarray(found), expected, atol=TOLERANCE)


@pytest.mark.parametrize("num_positions", [16, 27, 32, 64])
def test_decode_never_reads_beyond_num_positions(rng, num_positions):
    query, keys, values = normal(rng, 2, 4, 16), normal(rng, 2, 4, 64, 16), normal(rng, 2, 4, 64, 16)
    lengths = np.asarray([1, num_positions], np.int32)
    expected = reference.attend_decode(query, keys, values, lengths)
    keys[:, :, num_positions:] = values[:, :, num_positions:] = np.nan
    attend = jit(attention.attend_decode, static_argnames="num_positions")
    found = attend(query, keys, values, lengths, num_positions=num_positions)
    np.testing.assert_allclose(np.asarray(found), expected, atol=TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_append_decode_writes_one_position_a_sequence(rng, shape):
    cache, new = normal(rng, *shape), normal(rng, shape[0], shape[1], shape[3])
    positions = rng.integers(0, shape[2], shape[0], dtype=np.int32)
    positions[0] = shape[2]  # beyond the cache: dropped, not moved to the last position
    found = jit(attention.append_decode)(cache, new, positions)
    np.testing.assert_array_equal(np.asarray(found), reference.append_decode(cache, new, positions))


@pytest.mark.parametrize("start,count", [(0, 16), (0, 5), (7, 16), (40, 10), (47, 3), (49, 1), (45, 16), (3, 0)])
def test_append_chunk_writes_real_tokens_only(rng, start, count):
    cache, new = normal(rng, 3, 2, 50, 16), normal(rng, 16, 2, 16)
    found = jit(attention.append_chunk)(cache, new, np.int32(1), np.int32(start), np.int32(count))
    np.testing.assert_array_equal(np.asarray(found), reference.append_chunk(cache, new, 1, start, count))


@pytest.mark.parametrize("start,count", [(0, 16), (0, 5), (7, 16), (40, 10), (49, 1)])
def test_chunk_agrees_with_reference(rng, start, count):
    query, keys, values = normal(rng, 16, 2, 16), normal(rng, 3, 2, 50, 16), normal(rng, 3, 2, 50, 16)
    expected = reference.attend_chunk(query, keys, values, 2, start, count)
    found = np.asarray(jit(attention.attend_chunk)(query, keys, values, np.int32(2), np.int32(start)))
    np.testing.assert_allclose(found[:count], expected, atol=TOLERANCE)
    assert np.isfinite(found).all()


def test_chunk_never_reads_beyond_num_positions(rng):
    query, keys, values = normal(rng, 8, 2, 16), normal(rng, 2, 2, 50, 16), normal(rng, 2, 2, 50, 16)
    expected = reference.attend_chunk(query, keys, values, 0, 4, 8)
    keys[:, :, 16:] = values[:, :, 16:] = np.nan
    attend = jit(attention.attend_chunk, static_argnames="num_positions")
    found = attend(query, keys, values, np.int32(0), np.int32(4), num_positions=16)
    np.testing.assert_allclose(np.asarray(found), expected, atol=TOLERANCE)
